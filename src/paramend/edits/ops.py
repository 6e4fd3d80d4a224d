"""The one table of edits: a row gives the verb of `pm.at`, the step of a recipe, the command and the docs tables."""

import copyreg
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Literal, SupportsIndex, TypeAlias, TypeVar

from paramend.arrays.lowrank import LowRank, product_of
from paramend.edits import checks, damage, moves, runs
from paramend.edits.arguments import (
    ALONG,
    ARRAY,
    AXES,
    AXIS,
    BOUND,
    DEVIATION,
    DIRECTION,
    DTYPE,
    INITIALIZER,
    NEW_SHAPE,
    NUMBER,
    OPERAND,
    PERMUTATION,
    PLACES,
    SEED,
    Args,
)
from paramend.edits.call import Op
from paramend.edits.directions import check_projection, projection
from paramend.edits.table import ROWS, edit, in_place, moving
from paramend.leaves.specs import AnyArray, DtypeLike, Scalar, Seed

# mypy: disable-error-code="empty-body"
# A row is a function without a body: its name, its arguments and its docstring are those of the verb, and the line
# below it makes the twin that works in place. So editors and type checkers see the verbs in the table itself.

T = TypeVar("T")
Requantize: TypeAlias = Literal["amax", "keep", "never"]
# A function (key, shape, dtype), as JAX has them.
Initializer: TypeAlias = Callable[[AnyArray, tuple[int, ...], AnyArray], AnyArray]

OPS = ROWS


def op_of(name: str) -> Op:
    """The row of the table.

    >>> op_of("zero")
    <op zero>
    """
    return OPS[name]


# Each op exists once: a pickle holds its name.
copyreg.pickle(Op, lambda op: (op_of, (op.name,)))


class Edits(Generic[T]):
    """The verbs that change values, each a row of the table; `Selection` carries them out.

    A quantised weight is edited as the weight that it is: `zero` sets codes, a factor goes to scales, and everything
    else is computed in float32 and encoded to the nearest where it is stored in blocks that change. `requantize` says
    how: "amax" gives such blocks new scales, "keep" keeps those that are there, "never" refuses.
    """

    def _edit(self, op: Op, args: Args) -> T:
        raise NotImplementedError

    def _edit_(self, op: Op, args: Args) -> None:
        raise NotImplementedError

    @edit(
        "every element becomes +0.0",
        check=checks.check_zero,
        run=lambda library, x, args, place: library.zeros(x),
        slot=lambda args: ("set", 0),
        reads=False,
    )
    def zero(self, *, requantize: Requantize = "amax") -> T:
        """The tree with +0.0 in every selected element, even for NaN, inf and negative numbers.

        >>> pm.at({"w": np.array([-1.0, np.nan]), "b": np.ones(1)}, "w").zero()
        {'w': array([0., 0.]), 'b': array([1.])}
        """

    zero_ = in_place(zero)

    @edit(
        "every element becomes the scalar",
        check=checks.check_fill,
        run=lambda library, x, args, place: library.full(x, runs.native(library, args["value"])),
        slot=lambda args: ("set", args["value"]),
        takes=(NUMBER,),
        reads=False,
    )
    def fill(self, value: Scalar, *, requantize: Requantize = "amax") -> T:
        """The tree with a scalar in every selected element.

        Raises:
            SpecMismatch: the value is not a scalar, or the dtype cannot hold it.

        >>> pm.at({"w": np.zeros(2)}, "w").fill(0.5)
        {'w': array([0.5, 0.5])}
        """

    fill_ = in_place(fill)

    @edit(
        "the leaf becomes the array, of the same shape and dtype",
        check=checks.check_set,
        run=runs.set,
        slot=lambda args: ("set", args["value"]),
        takes=(ARRAY,),
        also=("replace", "assign"),
        reads=False,
        chunks=False,
        arithmetic=False,
    )
    def set(self, value: AnyArray | Mapping[str, AnyArray], *, requantize: Requantize = "amax") -> T:
        """The tree with the selected leaves replaced by an array of the same shape and dtype.

        Args:
            value: an array of any library, for all selected leaves; or a mapping from path to array, as `get` returns
                it, with exactly the selected paths.

        Raises:
            SpecMismatch: shape or dtype differ.

        >>> pm.at({"w": np.zeros(2)}, "w").set(np.array([1.0, 2.0]))
        {'w': array([1., 2.])}
        """

    set_ = in_place(set)

    @edit(
        "the operand is added, in the dtype of the leaf",
        check=checks.check_arithmetic,
        run=runs.add,
        slot=lambda args: None if isinstance(args["value"], LowRank) else ("add", args["value"]),
        product=lambda spec, args: product_of(args["value"], spec) if isinstance(args["value"], LowRank) else None,
        losses=damage.of_sum,
        takes=(OPERAND,),
        also=("plus", "sum"),
    )
    def add(self, value: Scalar | AnyArray | tuple[AnyArray, AnyArray], *, requantize: Requantize = "amax") -> T:
        """The tree with a scalar or a broadcastable array added to the selected leaves, in their dtype.

        A pair `(B, A)` of matrices, or stacks of them, adds `B @ A`, which must have the shape of the leaf: in float32,
        in float64 for leaves of float64, rounded once. On disk the product is never whole.

        >>> pm.at({"w": np.zeros(2)}, "w").add(1.5)
        {'w': array([1.5, 1.5])}
        """

    add_ = in_place(add)

    @edit(
        "the share along a direction is taken out",
        check=check_projection,
        run=runs.project_out,
        product=projection,
        losses=damage.of_shift,
        takes=(DIRECTION, NUMBER.named("how much of it: 1 is all", "1"), ALONG),
        also=("project-out", "orthogonalize"),
        chunks=False,
    )
    def project_out(
        self,
        direction: AnyArray,
        strength: Scalar = 1.0,
        axis: SupportsIndex | None = None,
        *,
        requantize: Requantize = "amax",
    ) -> T:
        """The tree with a direction taken out of the selected leaves (Arditi et al., 2024): W - strength * r (r^T W),
        for the unit vector r, in each matrix of a stack. It is computed and rounded as the product that `add` takes.

        Args:
            direction: a vector, which is not zero.
            strength: 1 takes all of it, 0.5 half.
            axis: the axis that it is along; by default, the one of the last two that has its length.

        Raises:
            BadArgument: the direction is zero, or not finite.
            SpecMismatch: neither axis has its length, or both; or a leaf does not hold floats.

        >>> pm.at({"w": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}, "w").project_out([0, 1, 0])
        {'w': array([[1., 2.],
               [0., 0.],
               [5., 6.]])}
        """

    project_out_ = in_place(project_out)

    @edit(
        "every element is multiplied, in the dtype of the leaf",
        check=checks.check_arithmetic,
        run=lambda library, x, args, place: library.multiply(x, runs.native(library, args["value"])),
        slot=lambda args: ("multiply", args["value"]),
        losses=damage.of_product,
        takes=(OPERAND,),
        aliases=("scale",),
        also=("mul",),
    )
    def multiply(self, value: Scalar | AnyArray, *, requantize: Requantize = "amax") -> T:
        """The tree with the selected leaves multiplied by a scalar or a broadcastable array, in their dtype.

        Integers that wrap and floats that overflow are counted in a `ValuesLost` warning, on disk in the report.
        `multiply(0)` is not `zero()`: it leaves -0.0 and NaN behind.

        >>> pm.at({"w": np.ones(2)}, "w").multiply(0.5)
        {'w': array([0.5, 0.5])}
        """

    multiply_ = in_place(multiply)

    @edit(
        "every element is brought between two bounds; NaN stays",
        check=checks.check_clip,
        run=runs.clip,
        takes=(BOUND.named("the least value", "-1"), BOUND.named("the greatest value", "1")),
        also=("clamp", "limit"),
    )
    def clip(self, lo: Scalar | None, hi: Scalar | None, *, requantize: Requantize = "amax") -> T:
        """The tree with the selected leaves clipped to two bounds, as by numpy's `clip`, in their dtype.

        NaN stays NaN. For leaves of integers the bounds may be fractions: values are clipped to the integers between.

        Args:
            lo: the least value, a scalar; None or -inf clips nothing below.
            hi: the greatest value; None or inf clips nothing above.

        Raises:
            BadArgument: lo is above hi, or a bound is NaN.
            SpecMismatch: the leaf holds bools or complex numbers, or its dtype has no value between the bounds.

        >>> pm.at({"w": np.array([-3.0, 0.5, np.nan, 9.0])}, "w").clip(-1, 1)
        {'w': array([-1. ,  0.5,  nan,  1. ])}
        """

    clip_ = in_place(clip)

    @edit("the leaf becomes fn(leaf)", runs.apply, checks.check_apply, chunks=False, arithmetic=False, placed=True)
    def apply(
        self, fn: Callable[[AnyArray], AnyArray], *, keep_spec: bool = True, requantize: Requantize = "amax"
    ) -> T:
        """The tree with each chosen leaf replaced by `fn(leaf)`.

        On a checkpoint too the function gets a whole leaf, or a whole slice of it: the largest one must fit in memory.
        All other edits work in pieces.

        Args:
            fn: array → array.
            keep_spec: whether a result of another shape or dtype is an error; in place it always is.

        >>> pm.at({"w": np.array([1.0, -2.0])}, "w").apply(np.abs)
        {'w': array([1., 2.])}
        """

    apply_ = in_place(apply)

    @edit(
        "the leaf takes another dtype",
        check=checks.check_cast,
        run=runs.cast,
        losses=damage.of_cast,
        keeps_spec=False,
        takes=(DTYPE,),
        also=("astype", "dtype"),
    )
    def cast(self, dtype: DtypeLike) -> T:
        """The tree with the selected leaves in another dtype, given by name or as a dtype of numpy, JAX or torch.

        Values that it cannot hold (1e5 in float16, NaN in int8) are counted in a `ValuesLost` warning, on disk in the
        report.

        >>> pm.at({"w": np.ones(2)}, "w").cast("float16")["w"].dtype
        dtype('float16')
        """

    @edit(
        "normal noise of a standard deviation is added",
        check=checks.check_noise,
        run=runs.noise,
        losses=damage.of_shift,
        placed=True,
        takes=(DEVIATION, SEED),
    )
    def noise(self, std: float, *, seed: Seed = 0, requantize: Requantize = "amax") -> T:
        """The tree with normal noise added to the selected leaves.

        Args:
            std: the standard deviation.
            seed: an int, which gives the same numbers in every library and on disk; or a JAX PRNG key, for use inside
                `jit`. The noise of a leaf depends only on the seed and its path.

        >>> a = pm.at({"w": np.zeros(2), "v": np.zeros(2)}, "**").noise(0.1, seed=3)
        >>> b = pm.at({"v": np.zeros(2), "w": np.zeros(2)}, "w").noise(0.1, seed=3)
        >>> bool((a["w"] == b["w"]).all()), bool((a["w"] == a["v"]).any())
        (True, False)
        """

    noise_ = in_place(noise)

    @edit(
        "the leaf is drawn anew by an initializer",
        check=checks.check_reinit,
        run=runs.reinit,
        reads=False,
        chunks=False,
        placed=True,
        takes=(INITIALIZER, SEED),
        also=("init", "initialize"),
    )
    def reinit(self, init: str | Initializer, *, seed: Seed = 0, requantize: Requantize = "amax") -> T:
        """The tree with the selected leaves drawn anew.

        Args:
            init: "lecun_normal", "he_uniform", "xavier_normal" ...: fans are read from the shape, (..., in, out) in JAX
                and numpy trees, (out, in, ...) in torch ones; or, for JAX leaves, a function (key, shape, dtype).
            seed: an int or a JAX PRNG key. The values depend only on the seed and the path.

        >>> kernel = pm.at({"w": np.zeros((100, 50))}, "w").reinit("lecun_normal", seed=1)["w"]
        >>> round(float(kernel.std()), 2)
        0.1
        """

    reinit_ = in_place(reinit)

    @edit("the axes get another order", takes=(AXES,), also=("swapaxes", "T"), **moving(moves.transposed))
    def transpose(self, axes: Sequence[SupportsIndex]) -> T:
        """The tree with the axes of the selected leaves in another order, as by `numpy.transpose`.

        Args:
            axes: for each new axis, the old one: `(1, 0)` swaps the axes of a matrix.

        Raises:
            SpecMismatch: an axis is missing, or given twice.
            OutOfRange: a leaf has no such axis.

        >>> pm.at({"w": np.array([[1, 2], [3, 4]])}, "w").transpose((1, 0))
        {'w': array([[1, 3],
               [2, 4]])}
        """

    @edit(
        "the elements, in C order, get another shape",
        takes=(NEW_SHAPE,),
        also=("view", "flatten"),
        **moving(moves.reshaped),
    )
    def reshape(self, shape: Sequence[SupportsIndex]) -> T:
        """The tree with the elements of the selected leaves, in C order, in another shape.

        Args:
            shape: the lengths of the axes; one of them may be -1.

        Raises:
            SpecMismatch: the shape has not as many elements.

        >>> pm.at({"w": np.arange(6)}, "w").reshape((2, -1))
        {'w': array([[0, 1, 2],
               [3, 4, 5]])}
        """

    @edit(
        "some places along an axis stay, in the order given",
        takes=(PLACES, AXIS),
        also=("gather", "index_select"),
        **moving(moves.taken),
    )
    def take(self, indices: slice | Sequence[SupportsIndex] | AnyArray, axis: SupportsIndex = 0) -> T:
        """The tree with some places along an axis of the selected leaves, in the order given.

        Args:
            indices: the places, which may be negative and occur more than once; or a slice; or a mask of bools.
            axis: the axis.

        Raises:
            OutOfRange: there is no such axis or place.
            SpecMismatch: a mask has not the length of the axis.

        >>> pm.at({"w": np.array([[1, 2, 3], [4, 5, 6]])}, "w").take([2, 0], axis=1)
        {'w': array([[3, 1],
               [6, 4]])}
        """

    @edit(
        "the places along an axis get another order",
        takes=(PERMUTATION, AXIS),
        also=("reorder", "shuffle"),
        **moving(moves.permuted),
    )
    def permute(self, index: Sequence[SupportsIndex] | AnyArray, axis: SupportsIndex = 0) -> T:
        """The tree with the places along an axis of the selected leaves in another order: `new[i] = old[index[i]]`.

        Args:
            index: the old place of each new one; each occurs once.
            axis: the axis.

        Raises:
            SpecMismatch: the index is not a permutation of the places.
            OutOfRange: there is no such axis or place.

        >>> pm.at({"w": np.array([10, 20, 30])}, "w").permute([2, 0, 1])
        {'w': array([30, 10, 20])}
        """
