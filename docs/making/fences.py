"""Examples of docstrings as code: Markdown takes a bare `>>>` for a quotation."""

import re

import griffe

EXAMPLE = re.compile(r"(?m)^( *)>>> .*\n?(?:(?! *$)\1.*\n?)*")


class Fences(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring:
            fenced = lambda found: f"{found[1]}```pycon\n{found[0].rstrip()}\n{found[1]}```\n"
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)
