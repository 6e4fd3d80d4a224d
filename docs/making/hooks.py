"""What `mkdocs build` does beyond pages as they are written: pages made from the code, notebooks, checks of links."""

import logging
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib
from docpages import made_pages
from mkdocs.structure.files import File
from notebooks import page_of

matplotlib.use("agg")
log = logging.getLogger("mkdocs.plugins.paramend")  # its warnings fail a strict build

TOP = Path(__file__).parents[2]
OURS = "https://github.com/paramend/paramend/"


def on_files(files, config):
    """Add the pages that are made, and replace each notebook by what it shows."""
    for path, markdown in made_pages().items():
        files.append(File.generated(config, path, content=markdown))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        source = f"*This page is [a notebook]({Path(file.src_uri).name}): run it yourself.*"
        page = re.sub(r"\A(# .*\n)", rf"\1\n{source}\n", page_of(Path(file.abs_src_path)))
        files.append(File.generated(config, str(Path(file.src_uri).with_suffix(".md")), content=page))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links to files that are no pages to the repository, and check that they are there."""

    def outside(match):
        target, _, anchor = match[1].partition("#")
        path = os.path.normpath(Path("docs") / Path(page.file.src_uri).parent / target)
        if path.startswith("docs/"):
            return match[0]
        return f"]({OURS}blob/main/{path}{'#' + anchor if anchor else ''})"

    markdown = re.sub(r"\]\((\.\./[^)\s]+)\)", outside, markdown)
    if not page.file.generated_by:  # as its page, which has what the notebook shows
        markdown = re.sub(r"\]\(([^)\s:]+)\.ipynb\)", r"](\1.md)", markdown)
    for path in re.findall(re.escape(OURS) + r"(?:blob|tree)/main/([^)\s#\"'>]+)", markdown):
        if not (TOP / path).exists():
            log.warning("%s links %s, which the repository does not have", page.file.src_uri, path)
    return markdown


def on_post_build(config):
    """Check the site that was built: whether it needs a network, and whether each list became a list."""
    site = Path(config.site_dir)
    for file in site.rglob("[!4]*.html"):  # 404.html knows no folder
        html, name = file.read_text(), file.relative_to(site)
        for url in re.findall(r"<(?:script|img|source|iframe)[^>]*\ssrc=\"?([^\s\">]+)", html) + re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon|preload)[^>]*href=\"?([^\s\">]+)", html
        ):
            if urlsplit(url).scheme in ("http", "https"):
                log.warning("%s loads %s from a network", name, url)
            elif not url.startswith("data:") and not (file.parent / unquote(urlsplit(url).path)).exists():
                log.warning("%s loads %s, which is not there", name, url)
        for paragraph in re.findall(r"<p>.*?</p>", html, re.DOTALL):
            if re.search(r"\n(?:[-*] |\d+\. |\|)", paragraph):
                log.warning("%s: a list or table that needs an empty line before it: %s", name, paragraph[:80])
    for style in site.rglob("*.css"):
        for url in re.findall(r"(?:url\(|@import )[\"']?(https?://[^\"')]+)", style.read_text()):
            log.warning("%s loads %s from a network", style.relative_to(site), url)
