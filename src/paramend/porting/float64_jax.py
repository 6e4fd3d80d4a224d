"""JAX in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp


@contextmanager
def float64() -> Iterator[None]:
    """A context, for this thread, in which JAX has 64 bits, and attention uses them."""
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    old = jax.nn.dot_product_attention
    try:
        jax.nn.dot_product_attention = _attention(old)
        with enable(True):
            yield
    finally:
        jax.nn.dot_product_attention = old


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
