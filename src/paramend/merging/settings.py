"""Settings: how some leaves are merged."""

from dataclasses import dataclass
from typing import Literal

Convention = Literal["paper", "mergekit", "peft"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How some leaves are merged; what is a tuple has an entry for each model.

    Attributes:
        how: the name of the method.
        weights: how much each model counts.
        t: how far from the first model to the second; for nearswap the greatest change.
        density: the share of changes that stay.
        gamma: the share of changes, the largest ones, that go.
        epsilon: by how much chances to stay differ from the density, by the rank within a row.
        seed: the seed of what is left to chance.
        scale: a factor of the change as a whole.
        divide: whether sums are divided by the sum of the weights; None: as the method does.
        rescale: whether changes that stay make up for those that go; None: as the method does.
        convention: whose reading of the method.
    """

    how: str
    weights: tuple[float, ...]
    t: float = 0.5
    density: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()
    epsilon: tuple[float, ...] = ()
    seed: int = 0
    scale: float = 1.0
    divide: bool | None = None
    rescale: bool | None = None
    convention: Convention = "paper"
