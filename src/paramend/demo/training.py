"""Training with minibatches and an optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from paramend.demo.digits import Digits

BATCH = 64


def train(model: Any, params: Any, tx: Any, digits: Digits, *, epochs: int, seed: int = 0) -> Any:
    """The parameters after some epochs with an optax optimizer."""
    pixels, labels = jnp.asarray(digits.train_pixels), jnp.asarray(digits.train_labels)
    batches = len(pixels) // BATCH

    def loss(params: Any, pixels: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply(params, pixels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def epoch(carry: Any, key: jax.Array) -> Any:
        order = jax.random.permutation(key, len(pixels))[: batches * BATCH].reshape(batches, BATCH)
        return jax.lax.scan(step, carry, (pixels[order], labels[order]))[0]

    carry = params, tx.init(params)
    for key in jax.random.split(jax.random.key(seed), epochs):
        carry = epoch(carry, key)
    return carry[0]
