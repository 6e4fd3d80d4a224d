"""JAX in float64, whatever a model asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

_WIDER = {"float16": "float64", "bfloat16": "float64", "float32": "float64", "complex64": "complex128"}


@contextmanager
def float64() -> Iterator[None]:
    """A context in which JAX has 64 bits in this thread, and `jnp.float32` and attention use them. What is compiled
    here is not what the user compiles elsewhere: the precision is a part of JAX's keys."""
    wide = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    old = [(jnp, name, getattr(jnp, name)) for name in _WIDER]
    old.append((jax.nn, "dot_product_attention", jax.nn.dot_product_attention))
    new = [*(getattr(jnp, name) for name in _WIDER.values()), _attention(jax.nn.dot_product_attention)]
    try:
        for (owner, name, _), value in zip(old, new, strict=True):
            setattr(owner, name, value)
        with wide(True), jax.default_matmul_precision("highest"):
            yield
    finally:
        for owner, name, value in old:
            setattr(owner, name, value)


def _attention(otherwise: Any) -> Any:
    """`jax.nn.dot_product_attention` without its cast of the scores to float32."""

    def attention(
        query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, *, is_causal: bool = False, **options: Any
    ) -> Any:
        scale = options.pop("scale", None)
        if any(each for name, each in options.items() if name != "implementation"):
            return otherwise(query, key, value, bias, mask, is_causal=is_causal, scale=scale, **options)
        groups = query.shape[-2] // key.shape[-2]
        key, value = (jnp.repeat(each, groups, axis=-2) for each in (key, value))
        scores = jnp.einsum("...qhd,...khd->...hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool)) if is_causal else True
        seen = seen if mask is None else jnp.logical_and(seen, mask)
        return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(jnp.where(seen, scores, -1e38), axis=-1), value)

    return attention
