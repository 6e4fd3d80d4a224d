"""Lives of checkpoints, as in test_lives.py, whose formats torch, gguf and flax define."""

import pytest

from support.stateful import live


@pytest.mark.filterwarnings("ignore")  # of torch, about itself
@pytest.mark.parametrize(("kind", "steps"), [("torch", 40), ("gguf", 60), ("dcp", 40), ("msgpack", 40)])
def test_lives(kind, steps):
    live(kind, steps, each=20)
