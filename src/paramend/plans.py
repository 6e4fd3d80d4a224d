"""Plans: what an edit will do, one row for each leaf of the result, known before anything is done."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from paramend import _text
from paramend.arrays.registry import backend_of, to_numpy
from paramend.errors import BadArgument, NoMatch, SpecMismatch, Unsupported
from paramend.leaves import Leaves
from paramend.ops import OPS, Call
from paramend.paths import natural
from paramend.selectors import resolve, slice_of, write_index
from paramend.specs import Spec
from paramend.tables import aligned

@dataclass(frozen=True, slots=True)
class Row:
    """One leaf of the result: `path, spec ◄─ source, calls`.

    Attributes:
        path: where the leaf will be.
        spec: what it will be.
        source: the number of the leaf that it comes from.
        before: the spec of that leaf.
        calls: the edits on the way, first to last; none for a leaf that stays.
    """

    path: str
    spec: Spec
    source: int
    before: Spec
    calls: tuple[Call, ...] = ()

    @property
    def edit(self) -> str:
        """The calls as text, each after the slice that it is about.

        >>> Row("wo", Spec((3, 2), "float32"), 0, Spec((3, 2), "float32"), (Call(OPS["zero"], {}, -1),)).edit
        '[-1] zero()'
        """
        return ", ".join(map(_said, self.calls))

    def to_dict(self) -> dict[str, Any]:
        """The row as data that JSON can hold."""
        return {
            "path": self.path,
            "dtype": self.spec.dtype,
            "shape": list(self.spec.shape),
            "nbytes": self.spec.nbytes,
            "dtype_before": self.before.dtype,
            "shape_before": list(self.before.shape),
            "edits": [_said(call) for call in self.calls],
        }


def _said(edit: Call) -> str:
    return str(edit) if edit.index is None else f"[{write_index(edit.index)}] {edit}"


@dataclass(frozen=True)
class Plan:
    """What an edit of some leaves will do. Its text is the table of a dry run.

    Attributes:
        leaves: what the numbers in the rows refer to.
        rows: one for each leaf of the result, in order.
    """

    leaves: Leaves
    rows: tuple[Row, ...]

    @property
    def changed(self) -> tuple[Row, ...]:
        """The rows that edit something."""
        return tuple(row for row in self.rows if row.calls)

    def __str__(self) -> str:
        table = [("path", "spec", "edit")]
        for row in sorted(self.changed, key=lambda row: natural(row.path)):
            spec = f"{row.spec}" if row.spec == row.before else f"{row.before} -> {row.spec}"
            table.append((row.path, spec, row.edit))
        changed = len(table) - 1
        verb = "changes" if changed == 1 else "change"
        total = f"{changed:,} of {_text.plural(len(self.rows), 'leaf', 'leaves')} {verb}"
        return "\n".join([*aligned(table), "", total])

    def to_dict(self) -> dict[str, Any]:
        """The plan as data that JSON can hold: the rows that edit something, and how many leaves stay."""
        changed = self.changed
        return {"changed": [row.to_dict() for row in changed], "kept": len(self.rows) - len(changed)}


def call(op: str, args: Mapping[str, Any]) -> Call:
    """An op of the table with its arguments; an array of any library becomes one of numpy.

    Raises:
        BadArgument: there is no such op, or its arguments are others.

    >>> print(call("fill", {"value": 0.5}))
    fill(0.5)
    >>> call("fil", {"value": 0.5})
    Traceback (most recent call last):
    paramend.errors.BadArgument: 'fil' is no edit
    <BLANKLINE>
    hint: "fill"
    """
    if op not in OPS:
        near = _text.closest(op, OPS, limit=1)
        raise BadArgument(f"{op!r} is no edit", hint=f'"{near[0]}"' if near else ", ".join(OPS))
    parameters = OPS[op].parameters
    takes = ", ".join(parameters) or "no arguments"
    for name in args:
        if name not in parameters:
            raise BadArgument(f"{op} has no argument {name!r}; it takes {takes}")
    for name in parameters:
        if name not in args and name not in OPS[op].optional:
            raise BadArgument(f"{op} needs {name}; it takes {takes}")
    value = args.get("value")
    if backend_of(type(value)) is not None:
        args = {**args, "value": to_numpy(value)}
    return Call(OPS[op], dict(args))


def plan(leaves: Leaves, selector: Any, edit: Call) -> Plan:
    """The plan of one edit of the chosen leaves. Everything that can be known without data is checked here.

    Args:
        leaves: a checkpoint or a tree.
        selector: text, or anything that `pm.sel` takes, also with a slice.
        edit: as `call` makes it.

    Raises:
        NoMatch: nothing is chosen.
        SpecMismatch: the edit does not fit a chosen leaf; the message names it.

    >>> from paramend.trees.registry import Tree
    >>> tree = Tree({"a": np.ones((2, 3)), "b": np.ones(3)})
    >>> print(plan(tree, "b", call("fill", {"value": 0.5})))
    path  spec        edit
    b     float64[3]  fill(0.5)
    <BLANKLINE>
    1 of 2 leaves changes
    """
    selector, index = slice_of(selector)
    if index is not None:
        edit = replace(edit, index=index)
    if edit.op.name == "apply" and not edit.args.get("keep_spec", True):
        raise Unsupported(
            "what a function makes of a leaf is known only when it runs, and a plan must know it before",
            hint="keep_spec=True, with a .cast(...) before or after",
        )
    chosen = frozenset(resolve(selector, leaves))
    rows = []
    for number in leaves.index.numbers:
        path, spec = leaves.index.path(number), leaves.spec(number)
        if number in chosen:
            rows.append(Row(path, _after(edit, spec, path), number, spec, (edit,)))
        else:
            rows.append(Row(path, spec, number, spec))
    return Plan(leaves, tuple(rows))


def _after(edit: Call, spec: Spec, path: str) -> Spec:
    try:
        return edit.spec(spec)
    except (SpecMismatch, NoMatch) as error:
        error.args = (f"{path}: {error}",)
        raise
