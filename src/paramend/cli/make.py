"""`paramend convert`: a checkpoint in another format, or in files of another size."""

from pathlib import Path

import click

from paramend.checkpoints import open as open_checkpoint
from paramend.cli.writing import carry_out


@click.command()
@click.argument("path", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT")
@click.option("--max-shard-size", metavar="SIZE", help='The most bytes of tensors in one file, such as "5GB".')
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Check that it can be done, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
def convert(path: Path, out: str, max_shard_size: str | None, force: bool, dry_run: bool, as_json: bool) -> None:
    """Write a checkpoint in another format, as one file, or as several.

    IN is a file or a directory. The suffix of OUT says the format (model.safetensors, model.pt ...); a slash at its
    end, or --max-shard-size, asks for a directory of safetensors files. Every value stays bit for bit.

    Exit status: 0 done; 2 an unreadable or damaged file, a leaf that the format cannot hold, or an OUT that cannot
    be written.
    """
    with open_checkpoint(path) as checkpoint:
        carry_out(
            checkpoint.plan,
            path,
            out,
            force=force,
            dry_run=dry_run,
            as_json=as_json,
            max_shard_size=max_shard_size,
            quiet=True,
        )
