"""Inserting: leaves of one model put into another that lacks them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from paramend.arrays.registry import backend, to_numpy
from paramend.checkpoints.assemble import assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.memory import Memory, editable
from paramend.edits.quantized import check_whole
from paramend.edits.structure import enter
from paramend.errors import NoMatch, RenameClash
from paramend.leaves.leaves import Editable, keys_of, plain
from paramend.leaves.paths import Label, labels, text_of, write_path
from paramend.leaves.specs import AnyTree
from paramend.reports import wording
from paramend.selectors.renames import keys, rename
from paramend.selectors.selector import SelectorLike, resolve

T = TypeVar("T")
Path = tuple[str, ...]


def insert(target: T, source: AnyTree, selector: SelectorLike, *, rename: Mapping[str, str] | None = None) -> T:
    """The target with leaves of a source that it lacks: a multi-token-prediction head, an adapter, a vision tower.

    Args:
        target: nested dicts, a state dict, an NNX State; or a checkpoint opened by `pm.open`: then the result is one,
            and nothing is read before its `.save(out)`.
        source: a tree or an opened checkpoint.
        selector: the leaves of the source.
        rename: path in the source → path in the result, with the wildcards of the first: `{"mtp.**": "model.mtp.**"}`.
            The first that matches a leaf counts; the others keep their paths.

    Returns:
        The target with the leaves at its end, in the library of its own; their dtypes stay.

    Raises:
        NoMatch: the selector, or a rule of `rename`, matches nothing.
        Quantized: a part of a quantised weight would be inserted without the rest.
        RenameClash: leaves are there already; the message lists them all.
        Unsupported: the target is a module, whose class determines what it holds.

    >>> pm.insert({"a": np.ones(1)}, {"b": np.zeros(1), "c": np.ones(2)}, "b")
    {'a': array([1.]), 'b': array([0.])}
    """
    host, donor = editable(target), editable(source)
    numbers = resolve(selector, donor)
    check_whole(donor, numbers, "be inserted")
    paths = _new_paths(donor, numbers, rename or {})
    _check(host, donor, paths)
    if isinstance(host, Checkpoint):
        own = [(host.index.paths[number], (host, number)) for number in host.index.numbers]
        new = [(_labels(paths[n]), (donor, n)) for n in numbers]
        return cast(T, assemble(host, [*own, *new], ties=host.ties))
    tree = cast(Memory, host)
    return cast(T, enter(tree, [(_nested(host, paths[n]), _native(host, donor.fetch(n))) for n in numbers]))


def _new_paths(donor: Editable, numbers: Sequence[int], rules: Mapping[str, str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for old, new in rules.items():
        moved = rename(old, new).over(donor.index)
        if not set(numbers) & moved.keys():
            resolve(old, donor)  # for its error, which names near matches
            raise NoMatch(f"{old} -> {new} renames none of the selected leaves", hint="leave it out or correct it")
        for number, path in moved.items():
            found.setdefault(number, tuple(key for key, _ in keys(path)))
    return {number: found.get(number) or keys_of(donor.index.paths[number]) for number in numbers}


def _labels(path: Path) -> tuple[Label, ...]:
    return tuple(label for key in path for label in labels(key))


def _check(host: Editable, donor: Editable, paths: Mapping[int, Path]) -> None:
    """Raise if a leaf would stand where another does, or a container."""
    separator = host.index.separator

    def text(path: Path) -> str:
        return plain(_labels(path), separator)

    there = {plain(path, separator) for path in host.index.paths.values()}
    inside = {plain(path[:depth], separator) for path in host.index.paths.values() for depth in range(1, len(path))}
    new = Counter(map(text, paths.values()))
    clashes = []
    for number, path in paths.items():
        name = text(path)
        above = any(text(path[:depth]) in there for depth in range(1, len(path)))
        if name in there or name in inside or above or new[name] > 1:
            clashes.append(f"{donor.index.path(number)} as {write_path(_labels(path), separator)}")
    if clashes:
        count = wording.plural(len(clashes), "leaf", "leaves")
        raise RenameClash(
            f"{count} would stand where the target has something already:\n  " + "\n  ".join(clashes),
            hint='rename={"old.**": "new.**"}; or delete what is there first; to replace values: pm.graft',
        )


def _nested(host: Editable, path: Path) -> Path:
    """The keys in a tree like the host: one for a state dict, one for each piece in nested containers."""
    theirs = host.index.paths.values()
    whole = _labels(path)
    if theirs and all(len(keys_of(each)) == 1 for each in theirs) and any(len(each) > 1 for each in theirs):
        return (plain(whole, host.index.separator),)
    return path if any(len(keys_of(each)) < len(each) for each in theirs) else tuple(map(text_of, whole))


def _native(host: Any, value: Any) -> Any:
    library = backend(host.read(host.index.numbers[0])) if host.index.numbers else backend(value)
    convert = getattr(library, "from_numpy", None)
    return value if backend(value) is library or convert is None else convert(to_numpy(value))
