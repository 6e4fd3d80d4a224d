"""Liveness: whether each parameter receives a gradient, and at which step first."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from paramend._optional import need
from paramend.edits.memory import Memory
from paramend.errors import BadArgument
from paramend.leaves.specs import AnyArray, Spec
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Section
from paramend.selectors.layers import notation, whole
from paramend.selectors.selector import SelectorLike, resolve
from paramend.trees.lookup import is_torch_module

M = TypeVar("M")
_RATE = 1e-2


@dataclass(frozen=True, slots=True)
class LiveRow:
    """When one leaf received its first gradient.

    Attributes:
        path: the leaf.
        spec: its shape and dtype.
        step: the first step, from 1, at which its gradient was not zero; None if it always was.
    """

    _data: ClassVar = ("path", "spec.dtype", "spec.shape", "step")

    path: str
    spec: Spec
    step: int | None

    @property
    def since(self) -> str:
        """The same in words."""
        return "dead" if self.step is None else f"from step {self.step}"


@dataclass(repr=False)
class LiveReport(Paged):
    """Which leaves receive a gradient. One behind a zero waits until that has moved: it comes alive at step 2.

    Attributes:
        rows: one for each leaf.
        steps: how many steps were taken.
    """

    _data = ("steps", "dead", "rows as leaves")

    rows: list[LiveRow] = field(default_factory=list)
    steps: int = 2

    @property
    def dead(self) -> list[LiveRow]:
        """The leaves that never received a gradient."""
        return [row for row in self.rows if row.step is None]

    def at(self, step: int) -> list[str]:
        """The paths of the leaves whose first gradient came at a step."""
        return [row.path for row in self.rows if row.step == step]

    def headline(self) -> str:
        """How many leaves are alive, and how many dead."""
        dead = len(self.dead)
        alive = wording.plural(len(self.rows) - dead, "leaf", "leaves")
        return f"{alive} alive, {dead} dead after {wording.plural(self.steps, 'step')}"

    def sections(self) -> list[Section]:
        """The leaves by the step of their first gradient."""
        titles = *(f"from step {step}" for step in range(1, self.steps + 1)), "dead"
        return [Section.of(title, [row for row in self.rows if row.since == title], "spec") for title in titles]

    def page(self) -> Page:
        """A map of the leaves, coloured by the step of their first gradient."""
        shown = "first gradients", self.headline(), self.rows
        return Page.of_rows(*shown, "step", "spec", groups="since", group_title="gradient")

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"dead": [row.path for row in self.dead]}


def check_live(model: M, loss: Callable[[M], AnyArray], selector: SelectorLike = "**", *, steps: int = 2) -> LiveReport:
    """A report of the step at which each parameter receives its first gradient.

    A copy of the model is trained by plain gradient descent; the model stays as it is. Leaves behind a zero come alive
    one step after it has moved. Two zeros in a row, such as a gate and the layer that it scales, never move: the leaves
    behind them are dead, although the model computes the right thing.

    Args:
        model: a torch module, or JAX parameters.
        loss: model or parameters → a scalar.
        selector: the leaves to report; or the layers, as in `pm.deepen`.
        steps: how many steps to take.

    >>> import jax.numpy as jnp
    >>> params = {"gate": jnp.zeros(()), "w": jnp.zeros(3), "head": jnp.ones(3)}
    >>> report = check_live(params, lambda p: ((p["gate"] * p["w"] + p["head"]) ** 2).sum())
    >>> report.at(1), [row.path for row in report.dead]
    (['head'], ['gate', 'w'])
    """
    if steps < 1:
        raise BadArgument(f"steps={steps} is not a positive integer", hint="steps=2")
    if is_torch_module(model):
        first, tree = _torch_steps(model, loss, steps)
    else:
        first, tree = _jax_steps(model, loss, steps)
    selector = whole(tree.index, selector) if isinstance(selector, str) and notation(selector) else selector
    chosen = [number for number in resolve(selector, tree) if tree.spec(number).kind == "float"]
    rows = [LiveRow(tree.index.path(n), tree.spec(n), first.get(n)) for n in chosen if n in first]
    return LiveReport(rows, steps)


def _torch_steps(model: Any, loss: Callable[[Any], Any], steps: int) -> tuple[dict[int, int | None], Memory]:
    import torch

    twin = copy.deepcopy(model)
    tree = Memory(twin)
    parameters = {id(parameter): parameter for parameter in twin.parameters() if parameter.requires_grad}
    first: dict[int, int | None] = {n: None for n in tree.index.numbers if id(tree.read(n)) in parameters}
    for step in range(1, steps + 1):
        twin.zero_grad(set_to_none=True)
        loss(twin).backward()
        with torch.no_grad():
            for number, known in list(first.items()):
                gradient = tree.read(number).grad
                if known is None and gradient is not None and bool(gradient.any()):
                    first[number] = step
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter -= _RATE * parameter.grad
    return first, tree


def _jax_steps(params: Any, loss: Callable[[Any], Any], steps: int) -> tuple[dict[int, int | None], Memory]:
    jax: Any = need("jax", extra="jax", to="check which parameters are alive")
    tree = Memory(params)
    first: dict[int, int | None] = {n: None for n in tree.index.numbers if tree.spec(n).kind == "float"}
    now = params
    for step in range(1, steps + 1):
        gradients = jax.grad(loss, allow_int=True)(now)
        theirs = Memory(gradients)
        for number, known in list(first.items()):
            if known is None and bool((theirs.read(number) != 0).any()):
                first[number] = step
        old = Memory(now)
        now = old.with_leaves({n: (x := old.read(n)) - (_RATE * theirs.read(n)).astype(x.dtype) for n in first})
    return first, tree
