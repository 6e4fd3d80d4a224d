"""Settings: how some leaves are merged."""

from dataclasses import dataclass
from typing import Literal

Convention = Literal["paper", "mergekit", "peft"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How some leaves are merged; what is a tuple has an entry for each model."""

    how: str  # the name of the method
    weights: tuple[float, ...]  # how much each model counts
    t: float = 0.5  # how far from the first model to the second; for nearswap the greatest change
    density: tuple[float, ...] = ()  # the share of changes that stay
    gamma: tuple[float, ...] = ()  # the share of changes, the largest ones, that go
    epsilon: tuple[float, ...] = ()  # by how much chances to stay differ from the density, by the rank within a row
    seed: int = 0  # the seed of what is left to chance
    scale: float = 1.0  # a factor of the change as a whole
    divide: bool | None = None  # whether sums are divided by the sum of the weights; None: as the method does
    rescale: bool | None = None  # whether changes that stay make up for those that go; None: as the method does
    convention: Convention = "paper"  # whose reading of the method
