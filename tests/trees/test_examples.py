"""Examples of what the functions of trees/ give."""

import torch

from paramend.trees.walks import containers


def test_containers():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(1, 1)})
    assert [(path, node is model, kind.name) for path, node, kind in containers(model)] == [
        ((), True, "torch module"),
        (("body",), False, "torch module"),
    ]
