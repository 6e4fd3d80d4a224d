"""The data, the 1,797 handwritten digits of 8 by 8 pixels that ship with scikit-learn, and training on them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from paramend.leaves.specs import Array

BATCH = 64


@dataclass(frozen=True)
class Digits:
    """Pixels between 0 and 1, one row for each digit, and labels: to train on, and held out for accuracies."""

    train_pixels: Array
    train_labels: Array
    pixels: Array
    labels: Array


def load(seed: int = 0) -> Digits:
    """The digits, split by the seed, with equal shares of each digit in both parts."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    train_pixels, held_out, train_labels, held_out_labels = train_test_split(
        pixels, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    return Digits(train_pixels, train_labels, held_out, held_out_labels)


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
