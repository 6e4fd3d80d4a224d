"""Plans: what an edit will do, one row for each leaf of the result, known before it runs."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any

from paramend.anatomy.documents import Change, Document
from paramend.arrays.initializers import NOWHERE, Site
from paramend.edits.call import Call, Coding, explained, settled
from paramend.edits.damage import Damage, said
from paramend.edits.ops import OPS
from paramend.errors import BadArgument, RenameClash, Unsupported, printable_lines
from paramend.formats.gathered import Gathered
from paramend.leaves.groups import groups_of
from paramend.leaves.leaves import Described, Index, Leaves, keys_of, plain, uncollected
from paramend.leaves.names import by_name
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.texts import shortened
from paramend.leaves.paths import Label, labels, natural, write_path
from paramend.leaves.specs import Spec
from paramend.pages.page import Column, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.fields import data_of, picked
from paramend.reports.tables import aligned
from paramend.selectors.slices import write_index


@dataclass(frozen=True, slots=True, repr=False)
class Row:
    """One leaf of the result: `path, spec ◄─ source, calls`."""

    path: str
    spec: Spec
    source: int  # the number of the leaf that it comes from
    before: Spec
    calls: tuple[Call, ...] = ()  # the edits, first to last; empty if the values stay
    places: tuple[Site, ...] = ()  # where the leaf was when each call was made, which random values depend on
    labels: tuple[Label, ...] = ()
    was: str = ""  # the path in the source, if it is another
    # For each key of a moved leaf, the depth in the source of the template of its container, or None.
    depths: tuple[int | None, ...] = ()
    # What a run of the edits did to values that the dtype cannot hold.
    damage: Damage = field(default_factory=Damage, compare=False)
    added: str = ""  # where it comes from, in reports of what came to a checkpoint in its own files
    # What it is made of before the calls, an origin or its text, if it is not the leaf of its path.
    made: Origin | str = ""
    coding: Coding | None = None  # of a quantised weight that a report shows as one leaf, how it is edited

    def __repr__(self) -> str:
        return f"<{self.path}: {self.spec}, {self.outcome or 'as it is'}>"

    def with_calls(self, calls: tuple[Call, ...], places: tuple[Site, ...], spec: Spec, damage: Damage) -> "Row":
        """The row with other calls; `dataclasses.replace` takes four times as long, and there may be 100,000 rows."""
        known = self.labels, self.was, self.depths
        return Row(self.path, spec, self.source, self.before, calls, places, *known, damage, self.added, self.made)

    @property
    def stays(self) -> bool:
        """Whether neither values nor path change."""
        return not self.calls and not self.was and not self.added

    @property
    def edit(self) -> str:
        """The calls as text, each after its slice.

        >>> Row("wo", Spec((3, 2), "float32"), 0, Spec((3, 2), "float32"), (Call(OPS["zero"], {}, -1),)).edit
        '[-1] zero()'
        """
        added = (f"inserted from {self.added}",) if self.added else ()
        moved = (f"renamed from {self.was}",) if self.was else ()
        return ", ".join((*added, *self.edits, *moved))

    @property
    def outcome(self) -> str:
        """What it is made of, the calls, and what they could not hold."""
        made = f"◄─ {shortened(str(self.made))}" if self.made and not self.added else ""
        coded = f"({self.coding.said})" if self.coding else ""
        edit, damage = ", ".join(filter(None, (made, self.edit))), str(self.damage)
        edit = " ".join(filter(None, (edit, coded)))
        return f"{edit}: {damage}" if damage else edit

    @property
    def edits(self) -> list[str]:
        """The calls, each as text after its slice."""
        return list(map(_said, self.calls))

    @property
    def origin(self) -> str:
        """What it is made of before the calls, as text; "" if it is the leaf of its path."""
        return str(self.made) if self.made else ""

    def to_dict(self) -> dict[str, Any]:
        return picked(self, "path", *_SPECS, "edits", *_MORE) | (data_of(self.coding) or {})


_SPECS = "spec.dtype", "spec.shape", "spec.nbytes", "before.dtype as dtype_before", "before.shape as shape_before"
_MORE = "was as renamed_from?", "added as inserted_from?", "origin?", "damage.overflowed?", "damage.lost?"


def _said(edit: Call) -> str:
    if edit.coding is not None:
        return f"{_said(edit.coding.asked[-1])} of {edit.coding.path} in {edit.coding.scheme}"
    return str(edit) if edit.index is None else f"[{write_index(edit.index)}] {edit}"


@dataclass(frozen=True, repr=False)
class Plan(Paged):
    """What an edit of some leaves will do. Its text is the table of a dry run. A plan never changes: editing it returns
    a new plan, in which leaves keep their numbers."""

    leaves: Leaves  # the leaves that the numbers in the rows refer to
    rows: tuple[Row, ...]  # one for each leaf of the result, in order
    deleted: tuple[Row, ...] = ()  # the rows of the deleted leaves
    texts: tuple[Document, ...] = ()  # the files beside the weights that change

    def __reduce__(self) -> tuple[Any, ...]:
        calls = [(row, edit) for row in self.changed for edit in row.calls]
        functions = {id(f): (f, row, edit) for row, edit in calls for f in edit.args.values() if callable(f)}
        for function, row, edit in functions.values():
            where = f"{row.path} is edited by {edit}, a function, and "
            by_name(function, "the plan", where, ", or checkpoint.save(out) and pickle pm.open(out)")
        return Plan, (self.leaves, self.rows, self.deleted, self.texts)

    def __copy__(self) -> "Plan":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return Plan(*copy.deepcopy((self.leaves, self.rows, self.deleted), memo), self.texts)

    @classmethod
    @uncollected()
    def of(cls, leaves: Leaves) -> "Plan":
        """The plan that changes nothing."""
        index = leaves.index
        paths = index.paths
        rows = []
        for number in index.numbers:
            spec = leaves.spec(number)
            made = leaves.made(number) if isinstance(leaves, Gathered) else ""
            rows.append(Row(index.path(number), spec, number, spec, labels=paths[number], made=made))
        return cls(leaves, tuple(rows))

    @property
    def changed(self) -> tuple[Row, ...]:
        """The rows that change something: values, spec or path."""
        return tuple(row for row in self.rows if not row.stays)

    @cached_property
    def restructured(self) -> bool:
        """Whether leaves are deleted or moved."""
        return bool(self.deleted) or any(row.was for row in self.rows)

    @cached_property
    def index(self) -> Index:
        """The names after the edits; a leaf keeps its number."""
        if not self.restructured:
            return self.leaves.index
        index = Index(self.leaves.index.separator)
        for row in self.rows:
            index.numbers.append(row.source)
            names = index.names
            for label in row.labels[:-1]:
                names = names.setdefault(label, {})
            names[row.labels[-1]] = row.source
        for path, layers in self.leaves.index.layers.items():
            index.mark(path, layers)
        return index

    @cached_property
    def by_number(self) -> dict[int, Row]:
        """The rows by the numbers of their leaves."""
        return {row.source: row for row in self.rows}

    def twins(self, number: int) -> list[int]:
        """The numbers of all paths of a leaf that are not deleted."""
        ties = self.leaves.ties
        one = ties.get(number)
        return [number] if one is None else [n for n, o in ties.items() if o == one and n in self.by_number]

    def name(self, row: Row) -> str:
        """The path of a row as plain text: the name of the leaf in a file."""
        return plain(row.labels, self.leaves.index.separator)

    @uncollected()
    def edited(self, calls: Mapping[int, Call]) -> "Plan":
        """The plan with further calls on some leaves; `SpecMismatch` or `Unsupported` where one does not fit."""
        index = self.index
        new: dict[int, Row] = {}
        known = {id(edit): settled(edit) for edit in calls.values()}
        specs: dict[tuple[int, Spec], Spec] = {}  # many leaves have the same spec
        for number, given in calls.items():
            edit = known[id(given)]
            first = min(self.twins(number), key=index.numbers.index) if self.leaves.ties else number
            place = Site(index.pieces(first), out_first=index.separator == ".") if edit.op.placed else NOWHERE
            for twin in self.twins(number):
                row = self.by_number[twin]
                why = "" if row.calls else self.leaves.refusal(twin)
                if why:
                    raise Unsupported(f"{row.path} cannot take {_said(edit)}: {why}", hint=_LEAVE_OUT)
                key = id(edit), row.spec
                after = specs.get(key) or specs.setdefault(key, explained(row.path, edit.spec, row.spec))
                new[twin] = row.with_calls((*row.calls, edit), (*row.places, place), after, Damage())
        return self._with(tuple(new.get(row.source, row) for row in self.rows))

    def without(self, numbers: Iterable[int]) -> "Plan":
        """The plan that deletes some leaves."""
        gone = {*numbers}
        kept = tuple(row for row in self.rows if row.source not in gone)
        return replace(self, rows=kept, deleted=(*self.deleted, *(row for row in self.rows if row.source in gone)))

    def beside(self, document: Document) -> "Plan":
        """The plan that also writes a file beside the weights."""
        return replace(self, texts=(*(each for each in self.texts if each.name != document.name), document))

    def renamed(self, moved: Mapping[int, Sequence[tuple[str, int | None]]]) -> "Plan":
        """The plan that moves some leaves to other paths, from `structure.moves`; `RenameClash` if they cannot."""
        rows = tuple(self._moved(row, moved[row.source]) if row.source in moved else row for row in self.rows)
        taken: dict[tuple[str, ...], Row] = {}
        inside: set[tuple[str, ...]] = set()
        for row in sorted(rows, key=lambda row: row.source in moved):  # unmoved leaves come first
            keys = keys_of(row.labels)
            inside.update(keys[:depth] for depth in range(1, len(keys)))
            taken.setdefault(keys, row)
        clashes = []
        for row in rows:
            keys = keys_of(row.labels)
            above = next((taken[keys[:depth]] for depth in range(1, len(keys)) if keys[:depth] in taken), None)
            if row.source in moved and (above or keys in inside or taken[keys] is not row):
                why = f"{above.path} is a leaf" if above else "which is taken"
                clashes.append(f"{self.by_number[row.source].path} would go to {row.path} ({why})")
        if clashes:
            raise RenameClash(
                f"{wording.plural(len(clashes), 'leaf', 'leaves')} would collide with others: "
                f"{wording.listing(clashes, 4)}",
                hint="delete what is there first, or rename to other paths",
            )
        return self._with(rows)

    def _moved(self, row: Row, keys: Sequence[tuple[str, int | None]]) -> Row:
        """A row at another path. Depths in a path that was itself moved are traced back to the source."""
        before = self.leaves.index
        new = tuple(label for key, _ in keys for label in labels(key))
        path, was = write_path(new, before.separator), before.path(row.source)
        depths = tuple(row.depths[depth] if depth and row.depths else depth for _, depth in keys)
        return replace(row, path=path, labels=new, was="" if path == was else was, depths=depths)

    @property
    def shown(self) -> "Plan":
        """The plan for readers: a quantised weight that is edited is one row, and not those that it is stored in."""
        parts: dict[str, list[Row]] = {}
        for row in self.rows:
            for path in {each.coding.path for each in row.calls if each.coding is not None}:
                parts.setdefault(path, []).append(row)
        if not parts:
            return self
        ones = {rows[0].source: _weight(rows) for rows in parts.values()}
        gone = {row.source for rows in parts.values() for row in rows}
        kept = (ones.get(row.source, row) for row in self.rows if row.source in ones or row.source not in gone)
        return self._with(tuple(kept))

    @uncollected()
    def told(self) -> "Plan":
        """The plan for a report, which neither holds arrays nor keeps files open."""
        known: dict[int, Call] = {}  # many leaves take the same call

        def said(edit: Call) -> Call:
            return known.get(id(edit)) or known.setdefault(id(edit), edit.told())

        def of(row: Row) -> Row:
            damage = Damage(row.damage.overflowed, row.damage.lost)
            row = replace(row, made=str(row.made)) if row.made else row
            if row.coding is not None:
                return replace(row, calls=tuple(map(said, row.calls)), coding=row.coding.told())
            return row.with_calls(tuple(map(said, row.calls)), row.places, row.spec, damage) if row.calls else row

        rows, deleted = (tuple(map(of, part)) for part in (self.shown.rows, self.deleted))
        return Plan(Described(self.leaves), rows, deleted, self.texts)

    def _with(self, rows: tuple[Row, ...]) -> "Plan":
        return replace(self, rows=rows)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        return f"<plan: {self.headline()}>"

    def headline(self) -> str:
        """How many leaves change."""
        return self.lines()[-1]

    def page(self) -> Page:
        """The result as a map, coloured by what becomes of each leaf, beside the leaves that are deleted."""
        if (shown := self.shown) is not self:
            return shown.page()
        rows = [*self.rows, *self.deleted]
        ends = [""] * len(self.rows) + ["deleted"] * len(self.deleted)
        kinds = [
            "inserted" if row.added else "changed" if row.calls else "renamed" if row.was else "kept" for row in rows
        ]
        columns = [
            Column("edit", [end or row.edit for end, row in zip(ends, rows, strict=True)], "text"),
            Column("before", [str(row.before) if row.before != row.spec else "" for row in rows], "text"),
        ]
        groups = [end or kind for end, kind in zip(ends, kinds, strict=True)]
        return Page.of_rows("edit", self.headline(), rows, *columns, "spec", groups=groups)

    @property
    def configured(self) -> list[Change]:
        """What changes in the files beside the weights."""
        return [change for document in self.texts for change in document.changes]

    @property
    def damage(self) -> str:
        """What the edits could not hold, as a sentence, after they ran; "" if nothing."""
        return said((row.path, row.damage) for row in self.rows)

    def lines(self) -> list[str]:
        """The table line by line, a header first."""
        if (shown := self.shown) is not self:
            return shown.lines()
        table = [("path", "spec", "edit")]
        deleted = {id(row) for row in self.deleted}
        made = [row for row in self.rows if row.made and row.stays]
        rows = sorted((*self.changed, *made, *self.deleted), key=lambda row: natural(row.path))
        for row in rows:
            stays = row.spec == row.before or id(row) in deleted
            spec = f"{row.spec}" if stays else f"{row.before} -> {row.spec}"
            table.append((row.path, spec, "deleted" if id(row) in deleted else row.outcome))
        changes = self.configured
        table += [(change.file, "", str(change)) for change in changes]
        gone, come = len(self.deleted), sum(bool(row.added) for row in rows)
        count = len(rows) - len(made) - gone - come
        all_leaves = wording.plural(len(self.rows) + gone - self._companions, "leaf", "leaves")
        said = [f"{count:,} {'changes' if count == 1 else 'change'}"] if count or not (gone or come or made) else []
        said += [
            f"{n:,} {'is' if n == 1 else 'are'} {what}"
            for n, what in ((len(made), "made of others"), (come, "inserted"), (gone, "deleted"))
            if n
        ]
        number, _, what = said[0].partition(" ")
        sums = [f"{number} of {all_leaves} {what}", *said[1:]]
        files = Counter(change.file for change in changes)
        sums += [f"{wording.plural(n, 'key')} of {file} change{'s' if n == 1 else ''}" for file, n in files.items()]
        return [*aligned(table), "", ", ".join(filter(None, (*sums, self.damage)))]

    @property
    def _companions(self) -> int:
        """How many rows are scales and the like of quantised weights, which count as one, where one is edited so."""
        if not any(row.coding for row in self.rows):
            return 0
        there = {row.source for row in self.rows}
        groups = (group for group in groups_of(self.leaves) if group.scheme.codec is not None)
        return sum(number in there for group in groups for number in group.companions)

    def to_dict(self) -> dict[str, Any]:
        """The plan as data that JSON can hold: the rows that change something, and how many leaves stay."""
        changed = [row for row in self.shown.rows if row.made or not row.stays]
        data: dict[str, Any] = {"changed": [row.to_dict() for row in changed]}
        if self.deleted:
            data["deleted"] = [row.was or row.path for row in self.deleted]
        if self.configured:
            data["config"] = [change.to_dict() for change in self.configured]
        return data | {"kept": len(self.rows) - len(changed)}


class Outcome(Paged):
    """A report of a plan that was carried out, whose rows are those of the plan."""

    plan: Plan

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", self.plan.told())

    @property
    def summary(self) -> str:
        """What was written, in one line."""
        raise NotImplementedError

    def headline(self) -> str:
        return self.summary

    def page(self) -> Page:
        return replace(self.plan.page(), headline=self.summary)

    def __str__(self) -> str:
        return f"{self.plan}\n{printable_lines(self.summary)}"


def _weight(rows: Sequence[Row]) -> Row:
    """A quantised weight as one row, of the rows of what it is stored in."""
    codings = {each.coding.serial: each.coding for row in rows for each in row.calls if each.coding is not None}
    first, *rest = (codings[serial] for serial in sorted(codings))
    coding = reduce(Coding.then, rest, first)
    calls = coding.asked
    return Row(coding.path, coding.spec, rows[0].source, coding.before, calls, was=rows[0].was, coding=coding)


def call(op: str, args: Mapping[str, Any]) -> Call:
    """An edit of the table with its arguments, numpy arrays for those of any library; `BadArgument` for others.

    >>> print(call("fill", {"value": 0.5}))
    fill(0.5)
    >>> call("fil", {"value": 0.5})
    Traceback (most recent call last):
    paramend.errors.BadArgument: 'fil' is not an edit
    <BLANKLINE>
    hint: "fill"
    """
    if op not in OPS:
        near = [row.name for row in OPS.values() if op in row.words] or wording.closest(op, OPS, limit=1)
        raise BadArgument(f"{op!r} is not an edit", hint=f'"{near[0]}"' if near else ", ".join(OPS))
    parameters = OPS[op].parameters
    takes = ", ".join(parameters) or "no arguments"
    for name in args:
        if name not in parameters:
            raise BadArgument(f"{op} has no argument {name!r}; it takes {takes}")
    for name in parameters:
        if name not in args and name not in OPS[op].optional:
            raise BadArgument(f"{op} needs {name}; it takes {takes}")
    return settled(Call(OPS[op], dict(args)))


_LEAVE_OUT = "leave it out of the selection"
