"""`pm.config`: the configuration beside the weights of a checkpoint, read and edited."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from paramend.anatomy.documents import Document, absent, document_of, place_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.errors import BadArgument, CannotRead, NoMatch, Unsupported
from paramend.formats.gathered import Gathered
from paramend.formats.jsontext import CONFIG
from paramend.formats.shards import Shards
from paramend.reports import wording


@dataclass(frozen=True, eq=False)
class Config(Mapping[str, Any]):
    """What a configuration holds, as a mapping that is read; its edits return the checkpoint, edited.

    Dots in a key lead into parts: `text_config.num_hidden_layers`. The keys of the mapping are those of the outermost
    part.

    Attributes:
        checkpoint: the checkpoint.
        document: its `config.json`.
    """

    checkpoint: Checkpoint
    document: Document

    def __getitem__(self, key: str) -> Any:
        """The value of a key.

        Raises:
            NoMatch: there is no such key; the message has the nearest one.
        """
        values = self.document.values
        part, last = place_of(values, key, self.document.name)
        if last not in part:
            raise absent(values, key, self.document.name)
        return part[last]

    def __iter__(self) -> Iterator[str]:
        return iter(self.document.values)

    def __len__(self) -> int:
        return len(self.document.values)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key, self) is not self

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or another one if there is no such key."""
        with suppress(NoMatch):
            return self[key]
        return default

    def set(self, values: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint with values in its configuration: one for `.save(out)`, or for `pm.patch`. New keys go last.

        Raises:
            NoMatch: a key leads into a part that is not there.
            BadArgument: JSON has no such value.
            Unsupported: the checkpoint is one file, and its configuration is another.
        """
        return self.edited(values)

    def delete(self, keys: str | Iterable[str]) -> Checkpoint:
        """The checkpoint without keys in its configuration.

        Raises:
            NoMatch: there is no such key; the message has the nearest one.
            Unsupported: as in `set`.
        """
        return self.edited({}, [keys] if isinstance(keys, str) else keys)

    def edited(self, values: Mapping[str, Any], gone: Iterable[str] = ()) -> Checkpoint:
        """The checkpoint with values in its configuration, and then without keys; see `set` and `delete`."""
        source: Any = self.checkpoint.source
        base = source.base if isinstance(source, Gathered) else source
        if not isinstance(base, Shards) and not self.document.own:
            file = self.document.file
            opened = f"pm.open({str(file.parent)!r}), or {file.parent} on the command line"
            raise Unsupported(
                f"{file} is no part of {base.path}: both are edited together only in a directory of weight files",
                hint=opened if base.path.is_file() else f"edit {file} itself",
            )
        return self.checkpoint.planned(self.checkpoint.plan.beside(self.document.edited(values, gone)))

    def __repr__(self) -> str:
        return f"<{self.document.file}: {wording.plural(len(self), 'key')}>"


def config(checkpoint: Checkpoint) -> Config:
    """The configuration beside the weights of an opened checkpoint, after the edits so far.

    Args:
        checkpoint: from `pm.open`.

    Raises:
        CannotRead: there is no `config.json` beside the weights.
        BadCheckpoint: it is damaged.
        BadArgument: it is not a checkpoint.

    >>> import tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = pm.save({"w": np.ones(2)}, folder / "m.safetensors"), (folder / "config.json").write_text('{"a": {"b": 1}}')
    >>> found = config(pm.open(folder))
    >>> found["a.b"]
    1
    >>> print(found.set({"a.b": 2, "c": "new"}).plan)
    path         spec  edit
    config.json        a.b: 1 -> 2
    config.json        c: "new" (new)
    <BLANKLINE>
    0 of 1 leaf change, 2 keys of config.json change
    """
    if not isinstance(checkpoint, Checkpoint):
        raise BadArgument("a configuration is beside an opened checkpoint alone", hint='pm.config(pm.open("model/"))')
    found = document_of(checkpoint)
    if found is None:
        raise CannotRead(f"{checkpoint.path}: there is no {CONFIG} beside the weights")
    _ = found.values
    return Config(checkpoint, found)
