"""Parts: leaves of a model, taken out as a model of their own, or put into another that lacks them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from paramend.anatomy.documents import document_of
from paramend.anatomy.parts import part_config
from paramend.anatomy.quantization import listed
from paramend.arrays.registry import backend, to_numpy
from paramend.checkpoints.assemble import exchanged
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.gathering import ties_of
from paramend.edits.decoding import floats, followed
from paramend.edits.memory import Memory, editable
from paramend.edits.quantized import check_renamed, check_whole
from paramend.edits.structure import boxes, enter, relocate
from paramend.edits.weights import carried, members
from paramend.errors import NoMatch, RenameClash, Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.leaves.groups import groups_of
from paramend.leaves.leaves import Editable, keys_of, labels_of, plain
from paramend.leaves.paths import Label, text_of, write_path
from paramend.leaves.specs import AnyTree
from paramend.mapping.report import LayoutReport, Moved
from paramend.reports import wording
from paramend.selectors.renames import Keys, rename
from paramend.selectors.selector import SelectorLike, resolve
from paramend.trees.lookup import find_kind, is_torch_module

T = TypeVar("T")
Path = tuple[str, ...]


def part(model: T, selector: SelectorLike, *, rename: Mapping[str, str] | None = None) -> tuple[T, LayoutReport]:
    """Some leaves of a model as a model of their own: the text model of a vision-language model, a tower, a head.

    Where exactly the text model, or another one that has its own part of `config.json`, is taken out of a checkpoint,
    that part becomes the configuration, with the class in `architectures`; a head that was tied stays so. The report
    of a save says what could not be derived. The files beside the weights go along.

    Args:
        model: a tree, or a checkpoint opened by `pm.open`: then the result is one, and nothing is read before its
            `.save(out)`.
        selector: the leaves.
        rename: path in the model → path in the result, with the wildcards of the first: `{"language_model.**": "**"}`.
            The first that matches a leaf counts; the others keep their paths.

    Returns:
        A tree like the model with these leaves alone, which are the same objects. Of a module, whose class determines
        what it holds, nested dicts of them; of a torch module a state dict. And a report, whose `rows` are the leaves
        that were taken and whose `kept` those that were left out.

    Raises:
        NoMatch: the selector matches nothing.
        Quantized: a part of a quantised weight would be taken without the rest.
        RenameClash: two leaves would have one path; the message lists them all.

    >>> part({"lm": {"a": np.ones(1), "b": np.zeros(1)}, "vision": np.ones(2)}, "lm.**", rename={"lm.**": "**"})[0]
    {'a': array([1.]), 'b': array([0.])}
    """
    host = editable(model)
    numbers = members(selector, host)
    check_whole(host, numbers, "be taken out")
    moved = moved_by(host, numbers, rename or {})
    paths = new_paths(host, numbers, moved)
    check_free(host, paths, [], host.index.separator, 'rename={"old.**": "new.**"}, with paths that are free')
    check_renamed(host, lambda: moved)
    taken = set(numbers)
    gone = [number for number in host.index.numbers if number not in taken]
    left = [host.index.path(number) for number in gone]
    report = moved_report("part", host.index.separator, host, paths, left, ("taken", "left out"))
    if isinstance(host, Checkpoint):
        made = _configured(host, host.planned(host.plan.without(gone)).relocated(moved), paths)
        return cast(T, made), report
    tree = cast(Memory, host)
    try:
        return cast(T, relocate(tree, moved, gone)), report
    except Unsupported:
        joined = is_torch_module(tree.root)
        entries = [((plain(labels_of(path), "."),) if joined else path, tree.values[n]) for n, path in paths.items()]
        return cast(T, enter(Memory({}), entries)), report


def _configured(old: Checkpoint, new: Checkpoint, paths: Mapping[int, Path]) -> Checkpoint:
    """The checkpoint with the configuration of the part, if what was taken is one."""
    document = document_of(new)
    if document is None or len(old) == len(new):
        return new
    pieces = {number: old.index.pieces(number) for number in old.index.numbers}
    renamed = {number: tuple(map(text_of, labels_of(path))) for number, path in paths.items()}
    found = part_config(document.values, pieces, renamed)
    if found is None:
        said = [f"{CONFIG} stays that of the whole model: what was taken is not exactly one of its parts"]
    else:
        name, config, told = found
        said = [f"{CONFIG}: {line}" for line in told]
        document = document.inner(name).holding(config)
    return new.planned(new.plan.beside(replace(document, said=tuple(said))))


def insert(
    target: T, source: AnyTree, selector: SelectorLike, *, rename: Mapping[str, str] | None = None
) -> tuple[T, LayoutReport]:
    """The target with leaves of a source that it lacks: a multi-token-prediction head, an adapter, a vision tower.

    Args:
        target: nested dicts, a state dict, an NNX State; or a checkpoint opened by `pm.open`: then the result is one,
            and nothing is read before its `.save(out)`.
        source: a tree or an opened checkpoint.
        selector: the leaves of the source.
        rename: path in the source → path in the result, with the wildcards of the first: `{"mtp.**": "model.mtp.**"}`.
            The first that matches a leaf counts; the others keep their paths.

    Returns:
        The target with the leaves at its end, in the library of its own, whose dtypes stay; and a report, whose `rows`
        are the leaves that came.

    Raises:
        NoMatch: the selector, or a rule of `rename`, matches nothing.
        Quantized: a part of a quantised weight would be inserted without the rest.
        RenameClash: leaves are there already; the message lists them all.
        Unsupported: the target is a module, whose class determines what it holds.

    >>> tree, report = pm.insert({"a": np.ones(1)}, {"b": np.zeros(1), "c": np.ones(2)}, "b")
    >>> tree, [row.path for row in report.rows]
    ({'a': array([1.]), 'b': array([0.])}, ['b'])
    """
    host, donor = editable(target), editable(source)
    numbers = members(selector, donor)
    check_whole(donor, numbers, "be inserted")
    paths = new_paths(donor, numbers, moved_by(donor, numbers, rename or {}))
    hint = 'rename={"old.**": "new.**"}; or delete what is there first; to replace values: pm.graft'
    check_free(donor, paths, host.index.paths.values(), host.index.separator, hint)
    report = moved_report("insert", host.index.separator, donor, paths, host.index.texts.values(), ("inserted", "kept"))
    if isinstance(host, Checkpoint):
        new, size = [(labels_of(paths[n]), (donor, n)) for n in numbers], len(host.index.numbers)
        ties = ties_of(donor.ties, {number: [size + place] for place, number in enumerate(numbers)})
        return cast(T, _listed(exchanged(host, {}, new, ties=ties), range(size))), report
    tree = cast(Memory, host)
    one = {number: donor.ties.get(number, number) for number in numbers}
    values = {number: native(host, donor.fetch(number)) for number in dict.fromkeys(one.values())}
    boxed = _boxed(tree, donor, numbers)
    entries = [(nested(host, paths[number]), boxed(number, values[one[number]])) for number in numbers]
    return cast(T, enter(tree, entries)), report


def _listed(made: Checkpoint, old: Iterable[int]) -> Checkpoint:
    """The checkpoint; if it is quantised, its configuration says of what came as floats that it is not."""
    if not made.quantization:
        return made
    codes = (number for group in groups_of(made) for number in group.numbers)
    return cast(Checkpoint, followed(made, partial(listed, modules=floats(made, [*old, *codes])))[0])


def moved_report(
    name: str, separator: str, of: Editable, paths: Mapping[int, Path], rest: Iterable[str], did: tuple[str, str]
) -> LayoutReport:
    """The report on leaves of a tree that have other paths in the result."""
    old = {n: of.index.path(n) for n in paths}
    rows = [Moved(write_path(labels_of(p), separator), of.spec(n), old[n], (old[n],)) for n, p in paths.items()]
    return LayoutReport(name, tuple(rows), tuple(rest), did)


def moved_by(donor: Editable, numbers: Sequence[int], rules: Mapping[str, str]) -> dict[int, Keys]:
    """The new paths of the leaves that rules move; the first that matches one counts."""
    found: dict[int, Keys] = {}
    chosen = set(numbers)
    for old, new in rules.items():
        moved = carried(donor, rename(old, new))
        if not chosen & moved.keys():
            resolve(old, donor)  # for its error, which names near matches
            raise NoMatch(f"{old} -> {new} renames none of the selected leaves", hint="leave it out or correct it")
        for number, path in moved.items():
            if number in chosen:
                found.setdefault(number, path)
    return found


def new_paths(donor: Editable, numbers: Sequence[int], moved: Mapping[int, Keys]) -> dict[int, Path]:
    """The keys of each leaf in the result."""
    index = donor.index
    return {n: tuple(key for key, _ in moved[n]) if n in moved else keys_of(index.paths[n]) for n in numbers}


def check_free(
    donor: Editable, paths: Mapping[int, Path], there: Iterable[Sequence[Label]], separator: str, hint: str
) -> None:
    """Raise if a leaf would stand where another does, or a container."""
    new = {number: labels_of(path) for number, path in paths.items()}
    every = [*there, *new.values()]
    count = Counter(plain(path, separator) for path in every)
    inside = {above for path in every for above in _above(path, separator)}
    old = {number: plain(donor.index.paths[number], separator) for number in paths}
    theirs = {above for number in paths for above in _above(donor.index.paths[number], separator)}
    # Such as fc.weight and fc.weight.absmax of one checkpoint.
    beside = {plain(path, separator) for number, path in new.items() if old[number] in theirs}
    inside -= beside
    clashes = []
    for number, path in new.items():
        above = any(count[each] for each in _above(path, separator) if each not in beside)
        name = plain(path, separator)
        if above or name in inside or count[name] > 1:
            clashes.append(f"{donor.index.path(number)} as {write_path(path, separator)}")
    if clashes:
        leaves = wording.plural(len(clashes), "leaf", "leaves")
        raise RenameClash(f"{leaves} would stand where something else does:\n  " + "\n  ".join(clashes), hint=hint)


def _above(path: Sequence[Label], separator: str) -> Iterator[str]:
    return (plain(path[:depth], separator) for depth in range(1, len(path)))


def nested(host: Editable, path: Path) -> Path:
    """The keys in a tree like the host: one for a state dict, one for each piece in nested containers."""
    theirs = host.index.paths.values()
    keys, whole = list(map(keys_of, theirs)), labels_of(path)
    joined = "".join(key for each in keys for key in each)
    separator = next((mark for mark in "./" if mark in joined), host.index.separator)
    if keys and all(len(each) == 1 for each in keys) and (separator in joined or separator == "."):
        return (plain(whole, separator),)
    return path if separator in joined else tuple(map(text_of, whole))


def _boxed(host: Memory, donor: Editable, numbers: Sequence[int]) -> Callable[[int, Any], Any]:
    """What puts a value into a box like that of a leaf of the donor, where the host has boxes too: NNX Variables."""
    ours = boxes(host, host.index.numbers[:1]).values()
    if not isinstance(donor, Memory) or not any(map(find_kind, ours)):
        return lambda number, value: value
    theirs = boxes(donor, numbers)
    kinds = {number: find_kind(box) for number, box in theirs.items()}

    def boxed(number: int, value: Any) -> Any:
        kind = kinds.get(number)
        return value if kind is None else kind.close(theirs[number], [value])

    return boxed


def native(host: Any, value: Any) -> Any:
    """A value in the library of a tree."""
    library = backend(host.read(host.index.numbers[0])) if host.index.numbers else backend(value)
    return value if backend(value) is library else library.from_numpy(to_numpy(value))
