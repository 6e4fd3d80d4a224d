"""`Layout`: a reversible map between two ways of storing one model, as rules that are data."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast

from paramend.disk.urls import path_of
from paramend.edits.arguments import shown
from paramend.edits.decoding import modules, renamed
from paramend.edits.memory import Memory, editable
from paramend.edits.structure import enter
from paramend.errors import BadArgument, CannotRead, NoMatch, ParamendError
from paramend.leaves.leaves import Editable, Group
from paramend.leaves.origins.stored import Stored
from paramend.leaves.paths import labels, text_of, write_path
from paramend.mapping.numbers import Numbers, read_config
from paramend.mapping.report import LayoutReport, Moved
from paramend.mapping.steps import Bundle, Step, read_step
from paramend.reports import wording
from paramend.selectors.grammar import captures_of
from paramend.selectors.patterns import parse
from paramend.selectors.renames import NewPath, keys, rename
from paramend.selectors.selector import resolve
from paramend.trees.tree import Tree

T = TypeVar("T")
Slot: TypeAlias = tuple[int, tuple[int, ...]]  # the place of a path in its rule, and the numbers that count its leaves
Rest = Literal["error", "keep"]
VERSION = 1
_MARK = "…"  # separates the numbers that count a family from the path of what is made of it
_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Rule:
    """One rule of a layout, read from left to right: the paths that it takes, those that it makes, and the steps
    between them. One that is optional may take nothing."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    do: tuple[Step, ...] = ()
    optional: bool = False

    def inverse(self) -> "Rule":
        return Rule(self.targets, self.sources, tuple(step.inverse() for step in reversed(self.do)), self.optional)

    def bound(self, number: Callable[[str], int]) -> "Rule":
        return replace(self, do=tuple(step.bound(number) for step in self.do))

    def __str__(self) -> str:
        return f"{wording.listing(self.sources, 4)} -> {wording.listing(self.targets, 4)}"

    def to_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {"from": _one(self.sources), "to": _one(self.targets)}
        if self.do:
            data["do"] = [step.to_data() for step in self.do]
        return data | ({"optional": True} if self.optional else {})


def _one(paths: Sequence[str]) -> str | list[str]:
    return paths[0] if len(paths) == 1 else list(paths)


class Layout:
    """A reversible map between two ways of storing one model.

    Args:
        rules: maps with `from` and `to`, a path or a list of paths each, with captured numbers such as `<n>`; and `do`,
            a list of steps from left to right, without which leaves are renamed. A number of `from` that `to` lacks is
            what `stack` runs over. `optional: true` allows a rule to take nothing.
        name: what the layout is called.
        rest: what becomes of leaves that no rule takes: "error" lists them, "keep" leaves them as they are.
        models: the values of `model_type` that it is for; a checkpoint whose `config.json` says another is refused.
            Names and shapes of other models may be the same, and mean something else.
        drop: selectors of leaves that `to` leaves out where they are there, such as counters that only one side has.
        stored: what `to` and `back` make of trees in memory, as `{"from": "flat", "to": "nested"}`: a dict of whole
            names, or dicts in dicts. Without it they stay as they are.

    Raises:
        BadArgument: a rule is not one; the message says which and why.

    >>> fused = Layout([{"from": ["q", "k"], "to": "qk", "do": [{"concat": {"axis": 0}}]}])
    >>> tree, report = fused.to({"q": np.zeros(2), "k": np.ones(2)})
    >>> tree["qk"].tolist(), fused.back(tree)[0]["k"].tolist()
    ([0.0, 0.0, 1.0, 1.0], [1.0, 1.0])
    """

    def __init__(
        self,
        rules: Sequence[Mapping[str, Any]],
        *,
        name: str = "",
        rest: Rest = "error",
        models: Sequence[str] = (),
        drop: Sequence[str] = (),
        stored: Mapping[str, str] | None = None,
    ) -> None:
        stored = {} if stored is None else stored
        if not isinstance(stored, Mapping) or {*stored} - {"from", "to"} or {*stored.values()} - {"flat", "nested"}:
            raise BadArgument(f"stored={stored!r} is not a choice", hint='{"from": "flat", "to": "nested"}')
        if rest not in ("error", "keep"):
            raise BadArgument(f"rest={rest!r} is not one of error, keep")
        if isinstance(rules, str | Mapping) or not rules:
            raise BadArgument("a layout is a list of rules", hint='[{"from": "a.<n>", "to": "b.<n>"}]')
        self.name, self.rest, self.stored = name, rest, dict(stored)
        self.models, self.drop = _paths(models or [], "models", least=0), _paths(drop or [], "drop", least=0)
        self._rules = tuple(_rule(data, f"rules[{place}]") for place, data in enumerate(rules))

    @classmethod
    def load(cls, path: str | Path) -> "Layout":
        """The layout in a YAML or JSON file.

        Raises:
            CannotRead: there is no such file.
            BadArgument: it is not a layout.
        """
        path = path_of(path)
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise CannotRead(f"{path}: {error.strerror or error}") from None
        if len(text) > _MAX_BYTES:
            raise BadArgument(f"{path.name} has more than {_MAX_BYTES:,} bytes")
        import yaml  # most programs read no layout

        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise BadArgument(f"{path.name} is not YAML: {error}") from None
        return cls.of(data, path.name)

    @classmethod
    def of(cls, data: Any, what: str = "a layout") -> "Layout":
        """The layout of a map with `version`, `name`, `rest` and `rules`.

        Raises:
            BadArgument: it is not a layout.
        """
        known = ("version", "name", "rest", "models", "drop", "stored", "rules")
        if not isinstance(data, Mapping):
            raise BadArgument(f"{what} is not a map of {', '.join(known)}")
        unknown = [key for key in data if key not in known]
        if unknown:
            near = wording.closest(str(unknown[0]), known, limit=1)
            raise BadArgument(f"{what}: there is no key {unknown[0]!r}", hint=near[0] if near else ", ".join(known))
        if data.get("version") != VERSION:
            raise BadArgument(f"{what}: {data.get('version')!r} is not a known version", hint=f"version: {VERSION}")
        lists = {key: data.get(key) or () for key in ("models", "drop")}
        name, rest = str(data.get("name") or ""), data.get("rest", "error")
        return cls(data.get("rules") or (), name=name, rest=rest, stored=data.get("stored"), **lists)

    def save(self, path: str | Path) -> None:
        """Write the layout into a YAML file."""
        import yaml  # as above

        from paramend.disk.io import write_file  # only here something is written
        from paramend.disk.permissions import NEW_FILE  # as above
        from paramend.disk.publishing import published  # as above

        text = yaml.safe_dump(self.to_data(), sort_keys=False, allow_unicode=True, width=120)
        with published(Path(path), force=True, access=NEW_FILE) as temporary:
            write_file(temporary, text.encode())

    def to_data(self) -> dict[str, Any]:
        """The layout as a map."""
        name = {"name": self.name} if self.name else {}
        more = {"models": list(self.models), "drop": list(self.drop), "stored": self.stored}
        return {
            "version": VERSION,
            **name,
            "rest": self.rest,
            **{key: value for key, value in more.items() if value},
            "rules": [rule.to_data() for rule in self._rules],
        }

    def __eq__(self, other: object) -> bool:
        return self.to_data() == other.to_data() if isinstance(other, Layout) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, self.rest, len(self._rules)))

    def __repr__(self) -> str:
        return f"<layout {self.name or 'without a name'}: {wording.plural(len(self._rules), 'rule')}>"

    def to(self, tree: T, **numbers: int) -> tuple[T, LayoutReport]:
        """The tree stored the other way, rules read from left to right, and a report.

        Args:
            tree: nested dicts, a state dict, an NNX State ...; or a checkpoint opened by `pm.open`: then the result is
                one too, and nothing is read before its `.save(out)`.
            numbers: numbers of the model that steps name, such as `num_attention_heads=8`. Those that are not given are
                read from the `config.json` beside a checkpoint.

        Raises:
            NoMatch: a rule takes nothing.
            BadArgument: a leaf is taken by no rule, or by two; leaves of a rule are missing; a number is not known.
            SpecMismatch: leaves of a rule do not fit together.
            RenameClash: two leaves would have one path.
        """
        leaves = editable(tree)
        gone = [number for selector in self.drop for number in parse(selector).find(leaves.index.names)]
        return self._mapped(leaves.deleted(gone) if gone else tree, self._rules, numbers, self.stored.get("to"))

    def back(self, tree: T, **numbers: int) -> tuple[T, LayoutReport]:
        """The tree stored the first way: the inverse of `to`, with the same arguments and errors."""
        return self._mapped(tree, tuple(rule.inverse() for rule in self._rules), numbers, self.stored.get("from"))

    def _check_model(self, leaves: Editable) -> None:
        kind = read_config(leaves).get("model_type") if self.models else None
        if kind is not None and kind not in self.models:
            raise BadArgument(
                f"{self.name or 'the layout'} is for {wording.listing(self.models)}, and config.json says {kind}: its "
                "leaves may have the same names and mean something else",
                hint='pm.layouts() lists what ships; a layout of your own may say models: ["..."]',
            )

    def _mapped(
        self, tree: T, rules: Sequence[Rule], given: Mapping[str, int], stored: str | None
    ) -> tuple[T, LayoutReport]:
        leaves = editable(tree)
        self._check_model(leaves)
        numbers = Numbers(leaves, given, {name for rule in rules for step in rule.do for name in step.names})
        groups: list[Group] = []
        rows: list[Moved] = []
        taken: dict[int, Rule] = {}
        for rule in rules:
            for group, made in groups_of(leaves, rule, numbers):
                for number in group.numbers:
                    if taken.setdefault(number, rule) is not rule:
                        said = f"{leaves.index.path(number)} is taken by two rules:\n  {taken[number]}\n  {rule}"
                        raise BadArgument(said)
                groups.append(group)
                rows += made
        if not groups:
            raise NoMatch("no rule takes anything:\n  " + "\n  ".join(map(str, rules)))
        kept = [leaves.index.path(number) for number in leaves.index.numbers if number not in taken]
        if kept and self.rest == "error":
            why = f"no rule takes {wording.plural(len(kept), 'leaf', 'leaves')}:\n  " + "\n  ".join(kept)
            raise BadArgument(why, hint="a rule for each, or rest: keep")
        _refuse_companions(leaves, taken, kept)
        report = LayoutReport(self.name, tuple(rows), tuple(kept))
        if stored is None or kept or not isinstance(leaves, Tree):
            made = leaves.regrouped(groups)
            quantised = getattr(leaves, "quantization", None)
            return cast(T, renamed(made, _modules(leaves, groups)) if quantised else made), report
        return cast(T, _stored(leaves, groups, stored == "nested")), report


def _stored(leaves: Any, groups: Sequence[Group], nested: bool) -> dict[str, Any]:
    """The leaves that groups make of a tree in memory, in a dict of names or in dicts in dicts."""
    made: list[tuple[list[str], Any]] = []
    for group in groups:
        for path, value in zip(group.paths, group.make([leaves.read(n) for n in group.numbers]), strict=True):
            keys = [text_of(label) for key, _ in path for label in labels(key)]
            made.append((keys if nested else [".".join(keys)], value))
    return cast(dict[str, Any], enter(Memory({}), made))


def _rule(data: Any, address: str) -> Rule:
    if not isinstance(data, Mapping) or not {"from", "to"} <= data.keys():
        raise BadArgument(f"{address}: {shown(data)} is not a rule", hint="{from: a.<n>.w, to: b.<n>.w}")
    unknown = [key for key in data if key not in ("from", "to", "do", "optional")]
    if unknown:
        raise BadArgument(f"{address}: there is no key {unknown[0]!r}", hint="from, to, do, optional")
    try:
        steps = tuple(map(read_step, data.get("do") or ()))
    except BadArgument as error:
        error.args = (f"{address}.do: {error.args[0]}",)
        raise
    sources, targets = _paths(data["from"], f"{address}.from"), _paths(data["to"], f"{address}.to")
    rule = Rule(sources, targets, steps, bool(data.get("optional", False)))
    differ = _absent(rule.sources, rule.targets) or _absent(rule.targets, rule.sources)
    if not steps and (differ or len(rule.sources) != 1 or len(rule.targets) != 1):
        raise BadArgument(f"{address}: {rule} is not a rename", hint="do: [{stack: {axis: 0}}]")
    return rule


def _paths(data: Any, address: str, least: int = 1) -> tuple[str, ...]:
    paths = [data] if isinstance(data, str) else data
    if not isinstance(paths, list | tuple) or len(paths) < least or not all(isinstance(path, str) for path in paths):
        raise BadArgument(f"{address}: {shown(data)} is neither a path nor a list of paths")
    return tuple(paths)


def _absent(here: Sequence[str], there: Sequence[str]) -> list[str]:
    """The numbers that some paths capture and others do not, in their order."""
    known = {name for path in there for name in captures_of(path)}
    return list(dict.fromkeys(name for path in here for name in captures_of(path) if name not in known))


def groups_of(
    leaves: Editable, rule: Rule, number_of: Callable[[str], int] | None = None
) -> list[tuple[Group, list[Moved]]]:
    """What a rule does with a tree: the leaves that it takes, and what it makes of them."""
    counting, counted = _absent(rule.sources, rule.targets), _absent(rule.targets, rule.sources)
    probe = _numbered(rule.targets[0], dict.fromkeys(counted, 0))
    prefix = "".join(f"<{name}>/" for name in counting)
    found: dict[tuple[str, ...], list[dict[tuple[int, ...], int]]] = {}
    for place, source in enumerate(rule.sources):
        for number, parts in rename(source, f"{prefix}{_MARK}/{probe}").texts(leaves.index).items():
            mark = parts.index(_MARK)
            families = found.setdefault(parts[mark + 1 :], [{} for _ in rule.sources])
            families[place][tuple(map(int, parts[:mark]))] = number
    if not found and not rule.optional:
        for source in rule.sources:
            resolve(source, leaves)  # for its error, which names near matches
        raise NoMatch(f"the rule {rule} takes nothing")
    bound = rule.bound(number_of) if found and number_of is not None else rule
    firsts = {families[0][min(families[0])] for families in found.values() if families[0]}
    paths = cache(lambda target: rename(rule.sources[0], target).over(leaves.index, firsts))
    return [_group(leaves, bound, families, counted, paths) for families in found.values()]


def _group(
    leaves: Editable,
    rule: Rule,
    families: Sequence[Mapping[tuple[int, ...], int]],
    counted: Sequence[str],
    new_paths: Callable[[str], Mapping[int, NewPath]],
) -> tuple[Group, list[Moved]]:
    tied = any(families) and rule.do[:1] == (Step("untie", {}),)  # one of its names is enough
    lacking = [source for source, family in zip(rule.sources, families, strict=True) if not family and not tied]
    paths = [leaves.index.path(number) for family in families for number in family.values()]
    if lacking:
        raise BadArgument(f"there is no {wording.listing(lacking)} beside {wording.listing(paths, 3)}")
    slots = [(place, key) for place, family in enumerate(families) for key in sorted(family)]
    numbers = tuple(families[place][key] for place, key in slots)
    said = wording.listing(paths, 3)
    made = _made(rule, slots, said, [Stored(leaves, number) for number in numbers])
    targets = []
    for target, family in zip(rule.targets, made, strict=True):
        for key in family:
            new = _numbered(target, dict(zip(counted, key, strict=True)))
            targets.append((keys(new_paths(new)[numbers[0]]), family[key]))
    mark, of = leaves.index.separator, tuple(paths)
    rows = [Moved(_text(path, mark), origin.spec, str(origin), of) for path, origin in targets]
    make = partial(_values, rule, slots, said)
    return Group(numbers, tuple(path for path, _ in targets), make), rows


def _made(rule: Rule, slots: Sequence[Slot], paths: str, values: Sequence[Any], *, check: bool = False) -> Bundle:
    bundle: Bundle = [{} for _ in rule.sources]
    for (place, key), value in zip(slots, values, strict=True):
        bundle[place][key] = value
    try:
        return _stepped(rule, bundle, check)
    except ParamendError as error:
        error.args = (f"{paths}: {error.args[0]}", *error.args[1:])
        raise


def _stepped(rule: Rule, bundle: Bundle, check: bool) -> Bundle:
    for step in rule.do:
        if check:
            step.check(bundle)
        bundle = step.run(bundle, len(rule.targets))
    if len(bundle) != len(rule.targets):
        raise BadArgument(f"{rule} makes {len(bundle)} leaves, and `to` has {len(rule.targets)} paths")
    lengths = {len(key) for family in bundle for key in family}
    if lengths - {len(_absent(rule.targets, rule.sources))}:
        why = f"{rule}: a number of `from` is not in `to`, and no stack runs over it"
        raise BadArgument(why, hint="do: [{stack: {axis: 0}}]")
    return bundle


def _values(rule: Rule, slots: Sequence[Slot], paths: str, values: Sequence[Any]) -> list[Any]:
    return [family[key] for family in _made(rule, slots, paths, values, check=True) for key in family]


def _modules(leaves: Editable, groups: Sequence[Group]) -> dict[str, str]:
    moved = {module: module for module in modules(leaves, leaves.index.numbers)}
    for group in groups:
        if len(group.numbers) == len(group.paths) == 1:
            (module,) = modules(leaves, group.numbers)
            moved[module] = _text(group.paths[0], ".").rpartition(".")[0]
    return moved


def _text(path: Sequence[tuple[str, int | None]], separator: str) -> str:
    return write_path(tuple(label for key, _ in path for label in labels(key)), separator)


def _numbered(path: str, numbers: Mapping[str, int]) -> str:
    return re.sub(r"<(\w+)>", lambda found: str(numbers.get(found[1], found[0])), path)


def _refuse_companions(leaves: Editable, taken: Mapping[int, Rule], kept: Sequence[str]) -> None:
    """Raise if a leaf that stays belongs to a module whose weight is made part of another."""
    gone = set()
    for number in (number for number, rule in taken.items() if rule.do):
        path = leaves.index.pieces(number)
        gone.add(path[:-1] if path[-1] in ("weight", "kernel") else path)
    stays = {path: leaves.index.pieces(number) for number, path in leaves.index.texts.items()}
    lost = [path for path in kept if any(stays[path][:depth] in gone for depth in range(1, len(stays[path])))]
    if lost:
        why = f"{wording.listing(lost, 4)} would stay behind, where no module is any more"
        raise BadArgument(why, hint="a rule for them: scales, biases and adapters go through the same map")


_SHELF = Path(__file__).parent / "shipped"


def layouts() -> list[str]:
    """The names of the layouts that ship, sorted; `pm.layout(name)` opens one.

    >>> "mixtral_4_to_5" in pm.layouts()
    True
    """
    return sorted(path.stem for path in _SHELF.glob("*.yaml"))


def layout(name: str) -> Layout:
    """A layout that ships.

    Raises:
        LookupError: there is none of that name; the message names near ones.

    >>> pm.layout("mixtral_4_to_5")
    <layout mixtral_4_to_5: 3 rules>
    """
    if name not in layouts():
        near = wording.closest(name, layouts()) or [known for known in layouts() if name in known]
        hint = wording.listing(near) if near else "pm.layouts() lists those that ship; pm.Layout.load(path) reads yours"
        raise NoMatch(f"there is no layout {name!r}", hint=hint)
    return Layout.load(_SHELF / f"{name}.yaml")
