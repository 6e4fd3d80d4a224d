"""The patient: a trained classifier, in memory and on disk. The steps edit copies of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import safetensors.numpy

from paramend.demo import training
from paramend.demo.network import Classifier
from paramend.disk.io import write_file
from paramend.edits.selection import at
from paramend.leaves.specs import Array


@dataclass(frozen=True)
class Patient:
    """A trained classifier, its parameters before training (`fresh`), and what is needed to try an edit on it: steps
    write their files to `folder`, and those that continue training do so for some `epochs`."""

    folder: Path
    digits: training.Digits
    model: Classifier
    fresh: Any
    params: Any
    epochs: int
    seed: int

    @property
    def file(self) -> Path:
        """The parameters on disk."""
        return self.folder / "digits.safetensors"

    def logits(self, params: Any, model: Classifier | None = None) -> Array:
        """The logits of the held-out digits with these parameters."""
        return np.asarray((model or self.model).apply(params, self.digits.pixels))

    def accuracy(self, params: Any, model: Classifier | None = None) -> float:
        """The share of the held-out digits that the network classifies correctly with these parameters."""
        return self.score(self.logits(params, model))

    def score(self, logits: Array) -> float:
        """The share of the held-out digits whose logit is the largest."""
        return float((logits.argmax(axis=-1) == self.digits.labels).mean())

    def trained_on(self, tx: Any) -> Any:
        """The parameters after more training with this optimizer."""
        return training.train(self.model, self.params, tx, self.digits, epochs=self.epochs, seed=self.seed + 1)


def prepare(folder: Path, *, epochs: int, seed: int) -> Patient:
    """A classifier, trained and saved."""
    data, model = training.load(seed), Classifier()
    fresh = model.init(jax.random.key(seed), data.pixels)
    params = training.train(model, fresh, optax.adam(2e-3), data, epochs=epochs, seed=seed)
    patient = Patient(folder, data, model, fresh, params, epochs=max(1, epochs // 3), seed=seed)
    save(params, patient.file)
    return patient


def save(params: Any, file: Path) -> None:
    """Write parameters as safetensors, each leaf under its path."""
    arrays = {path: np.asarray(leaf) for path, leaf in at(params, "**")}
    write_file(file, safetensors.numpy.save(arrays))
