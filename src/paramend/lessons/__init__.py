"""Five small worked problems that teach the five surgeries: replace, zero, freeze, warm-start, init to zero.

Each function solves one problem with Paramend. `paramend lesson NAME` prints its text, and `paramend lesson
NAME --grade FILE.py` grades your own answer; from Python, call `paramend.lessons.grading.grade`.
"""

from typing import TYPE_CHECKING, Any

from paramend.lessons.lesson import find as _find

if TYPE_CHECKING:
    import jax
    from torch import nn

__all__ = ["freeze_first_dense", "init_zero", "kernel_replace", "partial_init", "zero_last_layer"]


def kernel_replace(seed: float, x: Any, features: float, replacement_value: float) -> "jax.Array":
    """The output, (N, features), of a `Dense` layer whose kernel was filled with one value.

    Args:
        seed: seeds the initialisation; cast to int.
        x: inputs, (N, in_dim).
        features: the width of the layer; cast to int.
        replacement_value: what every entry of the kernel becomes.

    Example:
        >>> kernel_replace(0.0, [[1.0, 2.0, 3.0]], 2.0, 0.5).tolist()
        [[3.0, 3.0]]
    """
    return _find("kernel_replace").reference(seed, x, features, replacement_value)


def zero_last_layer(seed: float, x: Any, num_layers: float, features: float) -> "jax.Array":
    """The output, (N, features), of a network whose last kernel is zero and whose last bias is ones: ones.

    Args:
        seed: seeds the initialisation; cast to int.
        x: inputs, (N, in_dim).
        num_layers: the number of `Dense` layers; cast to int.
        features: the width of every layer; cast to int.

    Example:
        >>> zero_last_layer(0.0, [[1.0, 2.0, 3.0]], 3.0, 2.0).tolist()
        [[1.0, 1.0]]
    """
    return _find("zero_last_layer").reference(seed, x, num_layers, features)


def freeze_first_dense(seed: float, x: Any, y: Any, lr: float) -> "jax.Array":
    """[loss, norm_after, norm_before] of one step in which the first of two layers is frozen.

    The model is `Dense(8)`, relu, `Dense(1)`. The loss is the mean squared error before the step; the norms
    are the Frobenius norms of the kernel of `Dense_0` and are equal.

    Args:
        seed: seeds the initialisation; cast to int.
        x: inputs, (N, D).
        y: targets, (N,).
        lr: the learning rate of the step of plain gradient descent.

    Example:
        >>> loss, after, before = freeze_first_dense(0.0, [[1.0, 2.0], [3.0, 4.0]], [0.0, 1.0], 0.1)
        >>> bool(after == before)
        True
    """
    return _find("freeze_first_dense").reference(seed, x, y, lr)


def partial_init(seed: float, x: Any, num_full_layers: float, num_extra_layers: float, features: float) -> "jax.Array":
    """[parameters, layers] of a model whose first layers come from a smaller one.

    Args:
        seed: seeds the initialisation, split into a key for each model; cast to int.
        x: inputs, (N, in_dim).
        num_full_layers: the number of layers of the smaller model, which are all copied; cast to int.
        num_extra_layers: how many more layers the bigger model has; cast to int.
        features: the width of every layer; cast to int.

    Example:
        >>> partial_init(0.0, [[1.0, 2.0, 3.0]], 2.0, 1.0, 4.0).tolist()
        [56, 3]
    """
    return _find("partial_init").reference(seed, x, num_full_layers, num_extra_layers, features)


def init_zero(layer: "nn.Module") -> Any:
    """Set the weight and bias of a torch layer, if it has them, to zero in place, and return the layer.

    Args:
        layer: one layer. Call this on each layer of an `nn.Sequential`.

    Example:
        >>> from torch import nn
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> for layer in layers:
        ...     _ = init_zero(layer)
        >>> sum(int(p.count_nonzero()) for p in layers.parameters())
        0
    """
    return _find("init_zero").reference(layer)
