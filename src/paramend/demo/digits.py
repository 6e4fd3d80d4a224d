"""The data: the 1,797 handwritten digits of 8 by 8 pixels that ship with scikit-learn, a quarter of them held out."""

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from paramend.leaves.specs import Array


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
