"""Rules by which a leaf takes another shape: `pm.resize`. `pm.graft(..., resize={selector: rule})` applies them.

A rule knows from two shapes what it will do or why it cannot; `arithmetic` computes the values. Called with an
array and a shape, a rule returns the resized array.

>>> patches()(np.ones((2, 3, 8, 8), "float32"), (2, 3, 16, 16)).shape
(2, 3, 16, 16)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal as OneOf, get_args

import numpy as np

from paramend.errors import BadArgument
from paramend.leaves.specs import AnyArray, Array
from paramend.reports import wording
from paramend.resize.fits import METHODS, PLANS, Fit, Shape

__all__ = ["Resize", "channels", "patches", "positions", "vocabulary"]

Method = OneOf["bicubic", "bilinear", "linear", "cubic"]
Fresh = OneOf["mean+cov", "mean", "random", "zeros"]
Flat = OneOf["hwc", "chw"]
Keep = OneOf["gray", "rgb"]


@dataclass(frozen=True, slots=True, repr=False)
class Resize:
    """A rule by which arrays take another shape. The functions of this module create them.

    >>> rule = positions(prefix=1)
    >>> rule
    pm.resize.positions(prefix=1)
    >>> rule(np.ones((1, 5, 8), "float32"), (1, 10, 8)).shape
    (1, 10, 8)
    """

    kind: str
    options: Mapping[str, Any] = field(hash=False)

    def __repr__(self) -> str:
        usual = globals()[self.kind].__kwdefaults__
        given = (f"{name}={code(value)}" for name, value in self.options.items() if value != usual[name])
        return f"pm.resize.{self.kind}({', '.join(given)})"

    def __call__(self, array: AnyArray, shape: Sequence[int], *, path: Sequence[str] = ()) -> Array:
        """The array resized, in its own dtype.

        Args:
            array: anything that numpy reads.
            shape: the shape to take.
            path: the path of the leaf, piece by piece: random numbers depend on it, and its last piece gives layouts.
        """
        x = np.asarray(array)
        return self.planned(x.shape, tuple(shape), path).make(x).astype(x.dtype)

    def planned(self, old: Shape, new: Shape, path: Sequence[str] = ()) -> Fit:
        """The fit, from shapes alone; `SpecMismatch` if the rule does not fit these shapes."""
        return PLANS[self.kind](tuple(old), tuple(new), tuple(path), **self.options)

    def acts(self, old: Shape, new: Shape) -> bool:
        """Whether there is something to do: shapes differ, or grids with the same number of positions do."""
        grids = self.options.get("grid"), self.options.get("new_grid")
        return tuple(old) != tuple(new) or (None not in grids and grids[0] != grids[1])


def code(value: Any) -> str:
    """A value as it is typed in Python."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def positions(
    *,
    prefix: int | None = None,
    grid: tuple[int, int] | None = None,
    new_grid: tuple[int, int] | None = None,
    method: Method = "bicubic",
    antialias: bool = True,
) -> Resize:
    """The rule that interpolates a table of learned positions: over a grid, or along a sequence.

    Positions are along the one axis that differs, the rows of the grid one after the other after the prefix tokens,
    which are copied; or rows and columns have separate axes, as in (1, h, w, d). Values are computed as by
    `torch.nn.functional.interpolate(align_corners=False)`. The default is the rule of timm's
    `resample_abs_pos_embed`, and `jax.image.resize` gives the same numbers; `antialias=False` is what
    `interpolate_pos_encoding` of transformers does, and differs from JAX even if the grid grows (a = -0.75).

    Args:
        prefix: how many tokens before the grid (class, distillation, registers) are copied unchanged; None: the only
            number from 0 to 8 that leaves two squares.
        grid: (height, width) of the source's grid, if it is not square.
        new_grid: (height, width) of the target's grid, if it is not square.
        method: "bicubic" or "bilinear" over a grid; "linear" or "cubic" along a sequence, as for text and audio.
        antialias: whether the kernel widens when the table shrinks; it also sets the cubic kernel: a = -0.5 with,
            -0.75 without.

    >>> positions(method="bilinear")(np.array([7.0, 0.0, 1.0, 2.0, 3.0]), (10,))
    array([7. , 0. , 0.5, 1. , 1. , 1.5, 2. , 2. , 2.5, 3. ])
    >>> positions(method="linear")(np.array([[0.0], [1.0]]), (4, 1)).ravel()
    array([0.  , 0.25, 0.75, 1.  ])
    """
    _check("method", method, get_args(Method))
    for name, size in (("grid", grid), ("new_grid", new_grid)):
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise BadArgument(f"{name}={size!r} is not (height, width)", hint=f"{name}=(14, 14)")
        if size is not None and METHODS[method][0] == 1:
            raise BadArgument(f"method={method!r} is for a sequence, which has no grid", hint='method="bicubic"')
    if prefix is not None and prefix < 0:
        raise BadArgument(f"prefix={prefix} is negative", hint="prefix=1")
    options = {"prefix": prefix, "grid": grid and tuple(grid), "new_grid": new_grid and tuple(new_grid)}
    return Resize("positions", options | {"method": method, "antialias": antialias})


def vocabulary(*, rows: Fresh = "mean+cov", axis: int | None = None, shrink: bool = False, seed: int = 0) -> Resize:
    """The rule that adds rows to an embedding, an output layer or its bias; the old rows stay bit for bit.

    Args:
        rows: the fresh rows. "mean+cov": drawn around the mean of the old rows, with 1e-9 of their covariance, as
            `resize_token_embeddings` of transformers does (Hewitt 2021), so that no new token takes much probability
            from the old ones, and all new ones are nearly alike; "mean"; "random": normal about 0 with the standard
            deviation of the old values; "zeros".
        axis: the axis of the vocabulary; None: the only one that differs.
        shrink: whether the last rows may be dropped. Otherwise fewer rows are an error.
        seed: the seed of random rows, which also depend on the path of the leaf.

    >>> vocabulary(rows="mean")(np.array([[1.0, 2.0], [3.0, 6.0]]), (3, 2))
    array([[1., 2.],
           [3., 6.],
           [2., 4.]])
    """
    _check("rows", rows, get_args(Fresh))
    if seed < 0:
        raise BadArgument(f"seed={seed} is negative", hint="seed=0")
    return Resize("vocabulary", {"rows": rows, "axis": axis, "shrink": shrink, "seed": seed})


def patches(
    *,
    method: OneOf["bicubic", "bilinear"] = "bicubic",
    antialias: bool = True,
    flat: Flat | None = None,
    channels: int = 3,
) -> Resize:
    """The rule that resizes a patch embedding by pseudo-inverse, so that resized patches yield the same tokens.

    Exact when patches grow; the least-squares optimum when they shrink (FlexiViT, arXiv 2212.08013). Kernels are (out,
    in, h, w) as in torch or (h, w, in, out) as in Flax: the name weight or kernel tells, else the axes that differ.
    The method should be the one with which the images are resized.

    Args:
        method: how patches are resized: "bicubic" or "bilinear".
        antialias: as in `positions`. `method="bilinear", antialias=False` is the choice of big_vision.
        flat: for a linear layer over flattened square patches, their order: "hwc", as einops-style code writes them,
            or "chw", as `unfold` writes them.
        channels: how many channels such flattened patches have.

    >>> kernel = patches()(np.ones((8, 3, 16, 16)), (8, 3, 32, 32))
    >>> float(kernel[0].sum().round(6))  # its output for a patch of ones, as before
    768.0
    """
    _check("method", method, ("bicubic", "bilinear"))
    if flat is not None:
        _check("flat", flat, get_args(Flat))
    if channels < 1:
        raise BadArgument(f"channels={channels} is less than 1", hint="channels=3")
    return Resize("patches", {"method": method, "antialias": antialias, "flat": flat, "channels": channels})


def channels(*, keep: Keep = "gray") -> Resize:
    """The rule that adapts a kernel to images with another number of channels.

    Args:
        keep: the inputs whose output stays. "gray": images whose channels are all equal. Channels are repeated and
            divided by how often each is used, or summed into one; if the new count is a multiple of the old, or 1,
            that is the rule of image libraries (timm's `adapt_input_conv`). "rgb": any image, by its old channels;
            added ones start at zero.

    >>> channels()(np.array([[[1.0], [2.0], [3.0]]]), (1, 1, 1))
    array([[[6.]]])
    """
    _check("keep", keep, get_args(Keep))
    return Resize("channels", {"keep": keep})


def _check(name: str, given: Any, known: Sequence[str]) -> None:
    if given not in known:
        near = wording.closest(str(given), known, 1) or known
        said = wording.listing([repr(choice) for choice in known])
        raise BadArgument(f"{name}={given!r} is not one of {said}", hint=f'{name}="{near[0]}"')
