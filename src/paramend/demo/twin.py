"""The same network in torch, with the same weights."""

from typing import Any

import numpy as np
import torch
from torch import nn

from paramend.edits.selection import at


class Twin(nn.Module):
    """Ten logits from 64 pixels, computed like those of `Classifier`."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *blocks, last = self.layers
        x = first(x).relu()
        for up, down in zip(blocks[::2], blocks[1::2], strict=True):
            x = x + down(up(x).relu())
        return last(x)


def twin_of(params: Any) -> Twin:
    """The torch twin of a Flax classifier. A torch weight is the transpose of a Flax kernel."""
    layers = [params["params"][f"Dense_{n}"] for n in range(len(params["params"]))]
    twin = Twin([layer["kernel"].shape for layer in layers])
    for n, layer in enumerate(layers):
        at(twin, f"layers.{n}.weight").set_(layer["kernel"].T)
        at(twin, f"layers.{n}.bias").set_(layer["bias"])
    return twin


def twin_logits(twin: Twin, pixels: Any) -> np.ndarray[Any, Any]:
    """The logits that the twin computes for some digits."""
    with torch.no_grad():
        return twin(torch.from_numpy(pixels)).numpy()  # type: ignore[no-any-return]
