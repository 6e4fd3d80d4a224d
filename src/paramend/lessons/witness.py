"""A witness of what a solution does with the trees that Flax returns to it.

The few numbers of a result do not distinguish a kernel that lost its dtype from one that kept it, or a copied
layer from a fresh one. So while a solution is graded the witness

- makes biases that Flax initialises to zero random, as training would, so that a lost bias shows in the
  result; and on request makes the parameters bfloat16, so that a lost dtype shows;
- keeps a picture of every tree that `init` returns, so that an edit in place shows;
- keeps the last tree passed to `apply`, and every tree that the solution's own code holds or passes on.

A right answer passes without any of this: what was not seen is not compared.
"""

import copy
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from paramend.lessons.lesson import Case, Solve
from paramend.lessons.observation import Observation, file_of, observed

Path = tuple[str, ...]
Picture = dict[Path, Any]


@dataclass
class Handed:
    """A tree that `init` returned, with a picture of it at that moment."""

    rng: Any
    tree: Any
    picture: Picture

    @property
    def edited(self) -> bool:
        """Whether a leaf of the tree was replaced or added since, in the returned dict itself."""
        now = picture(self.tree)
        return any(path not in self.picture or leaf is not self.picture[path] for path, leaf in now.items())


@dataclass
class Witness:
    """What was seen during one call of a solution."""

    handed: list[Handed] = field(default_factory=list)  # every tree that `init` returned, in order
    applied: Picture | None = None  # the picture of the last tree that was passed to `apply`
    # Every tree that the solution's code held when one of its functions returned, or passed to a call, or got from one.
    held: list[Any] = field(default_factory=list)


def picture(tree: Any) -> Picture:
    """Path → leaf of a nested mapping, which may be flattened to tuple keys or "a/b" keys.

    >>> picture({"params": {"Dense_0/bias": 1}, ("params", "Dense_1", "bias"): 2})
    {('params', 'Dense_0', 'bias'): 1, ('params', 'Dense_1', 'bias'): 2}
    """
    leaves: Picture = {}

    def visit(node: Any, path: Path) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                pieces = key if isinstance(key, tuple) else str(key).split("/")
                visit(child, (*path, *map(str, pieces)))
        else:
            leaves[path] = node

    visit(tree, ())
    return leaves


def layer_names(paths: Iterable[Path]) -> dict[Path, str]:
    """Path → a name that does not depend on how the solution named its layers: "layer 0 kernel".

    >>> layer_names([("params", "out_10", "bias"), ("params", "out_9", "bias")])
    {('params', 'out_10', 'bias'): 'layer 1 bias', ('params', 'out_9', 'bias'): 'layer 0 bias'}
    """
    paths = list(paths)
    layers = sorted({path[:-1] for path in paths}, key=_natural)
    return {path: f"layer {layers.index(path[:-1])} {path[-1]}" for path in paths}


def _natural(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", "/".join(path))
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]


def same(left: Any, right: Any) -> bool | None:
    """Whether two leaves are the same object, or equal in dtype and every bit; None if a tracer hides a value."""
    if left is right:
        return True
    if isinstance(left, jax.core.Tracer) or isinstance(right, jax.core.Tracer):
        return None
    a, b = np.asarray(left), np.asarray(right)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@contextmanager
def watching(file: str, *, half: bool = False) -> Iterator[Witness]:
    """A witness that watches while the `with` block runs: calls and variables of the code of `file`. If `half`, `init`
    returns parameters in bfloat16."""
    witness = Witness()
    init, apply = nn.Module.init_with_output, nn.Module.apply  # `init` goes through `init_with_output`

    def watched_init(self: nn.Module, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        out, variables = init(self, rngs, *args, **kwargs)
        variables = _as_trained(variables, rngs, half=half)
        leaves = picture(variables)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values()):  # nothing to see inside `jit`
            witness.handed.append(Handed(rngs, variables, leaves))
        return out, variables

    def watched_apply(self: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(variables, Mapping):
            witness.applied = picture(variables)
        return apply(self, variables, *args, **kwargs)

    def look(frame: FrameType, event: str, result: Any) -> None:
        if event != "return":
            return
        caller = frame.f_back
        if frame.f_code.co_filename == file or (caller is not None and caller.f_code.co_filename == file):
            witness.held.extend(_trees([*frame.f_locals.values(), result]))

    before = sys.getprofile()
    nn.Module.init_with_output, nn.Module.apply = watched_init, watched_apply
    sys.setprofile(look if file else before)
    try:
        yield witness
    finally:
        sys.setprofile(before)
        nn.Module.init_with_output, nn.Module.apply = init, apply


def _trees(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, TrainState):
            value = value.params
        if isinstance(value, Mapping):
            yield value
        elif isinstance(value, tuple | list) and len(value) <= 8:  # *args, or a result such as (merged, report)
            yield from (item for item in value if isinstance(item, Mapping))


def _as_trained(variables: Any, rngs: Any, *, half: bool) -> Any:
    """The same tree with random values in biases that are zero; all floats in bfloat16 if `half`. The values depend
    only on the key and the path, so that `init` called twice returns the same tree."""
    key = rngs.get("params") if isinstance(rngs, Mapping) else rngs

    def leaf(path: tuple[Any, ...], value: Any) -> Any:
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        if getattr(path[-1], "key", None) == "bias":
            salt = zlib.crc32(jax.tree_util.keystr(path).encode()) & 0x7FFFFFFF
            noise = jax.random.uniform(jax.random.fold_in(key, salt), value.shape, value.dtype, 0.5, 1.5)
            value = jnp.where(jnp.all(value == 0), noise, value)
        return value.astype(jnp.bfloat16) if half else value

    return jax.tree_util.tree_map_with_path(leaf, variables)


def observe(solve: Solve, case: Case, facts: Callable[[Witness, Observation], dict[str, str]]) -> Observation:
    """What `solve` returned on a case, with the facts that a lesson derives from the witness."""
    args = copy.deepcopy(case.args)
    with watching(file_of(solve), half=case.half) as witness, np.errstate(all="ignore"):
        seen = observed(lambda: solve(*args), solve)
    if seen.raised:
        return seen
    untouched = all(np.array_equal(a, b) for a, b in zip(args, case.args, strict=True))
    arguments = {"the arguments": "left as they were" if untouched else "edited in place"}
    edited = any(handed.edited for handed in witness.handed)
    place = {"the tree from init": "edited in place" if edited else "left as it was"} if witness.handed else {}
    return Observation(seen.result, facts={**facts(witness, seen), **place, **arguments})


def applied_facts(witness: Witness, _: Observation) -> dict[str, str]:
    """What became of each leaf between the last `init` and the last `apply`."""
    if not witness.handed or witness.applied is None:
        return {}
    handed, facts = witness.handed[-1], dict[str, str]()
    names = layer_names(handed.picture)
    for path, before in handed.picture.items():
        after = witness.applied.get(path)
        if after is None:
            facts[names[path]] = "missing"
            continue
        facts[f"{names[path]} dtype"] = str(getattr(after, "dtype", type(after).__name__))
        kept = same(before, after)
        if kept is not None:
            facts[names[path]] = "as initialised" if kept else _content(after)
    strangers = ["/".join(path) for path in witness.applied if path not in handed.picture]
    facts["leaves that no layer asked for"] = ", ".join(strangers) or "none"
    return facts


def _content(leaf: Any) -> str:
    values = np.asarray(leaf).astype(np.float32)
    return f"all {values.flat[0] + 0:g}" if values.size and (values == values.flat[0]).all() else "other values"


def candidates(witness: Witness, fits: Callable[[Picture], bool]) -> Iterator[Picture]:
    """The pictures of held trees that fit and are not just what `init` returned, latest first."""
    for tree in reversed(witness.held):
        leaves = picture(tree)
        if not any(path[0] == "params" for path in leaves):  # many use only the inner dict
            leaves = {("params", *path): leaf for path, leaf in leaves.items()}
        pristine = any(
            leaves.keys() == handed.picture.keys() and all(leaves[p] is handed.picture[p] for p in leaves)
            for handed in witness.handed
        )
        if leaves and not pristine and fits(leaves):
            yield leaves
