"""Frozen buffers of torch modules stay bit for bit in real training, whatever moves them in the forward pass."""

import copy
import pickle

import pytest
import torch
from torch import nn

from paramend.freezing.freeze import freeze_, unfreeze_

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Codebook(nn.Module):
    """A codebook that is a moving average: in place, through `.data`, by a new tensor, or in eval mode too."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(4, 4)
        self.register_buffer("codebook", torch.ones(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.full((4,), 2.0))

    def forward(self, x):
        x = self.linear(x)
        if self.training or self.how == "always":
            new = self.codebook * 0.9 + x.detach().mean(0) * 0.1
            if self.how == "assigned":
                self.codebook = new
            else:
                (self.codebook.data if self.how == "data" else self.codebook).copy_(new)
            self.count += 1
        return x + self.codebook * self.constant


class Statistics(nn.Module):
    """A layer of one's own whose statistics do not heed the mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x):
        self.running_mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.running_mean


class Above(nn.Module):
    """A model that moves the buffer of its part, which itself never runs."""

    def __init__(self):
        super().__init__()
        self.part = nn.ModuleDict({"store": nn.Module()})
        self.part["store"].register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.part["store"].mean.add_(x.detach().mean(0))
        return x + self.part["store"].mean


class Table(nn.Module):
    """A codebook of parameters without gradients, which the module above it updates."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.sum = nn.Parameter(torch.zeros(4), requires_grad=False)

    def update(self, x):
        self.sum.data.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.weight.data.copy_(self.sum * 2)


class WithTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), Table()

    def forward(self, x):
        x = self.linear(x)
        if self.training:
            self.table.update(x.detach())
        return x + self.table.weight


class Assigned(nn.Module):
    """A codebook whose parameters are made anew in each step, as in the first codes of VQ-VAE with moving averages."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.mean = nn.Parameter(torch.ones(3, 4))
        self.register_buffer("size", torch.ones(3))

    def forward(self, x):
        if self.training:
            self.size = self.size * 0.9 + 0.2
            self.mean = nn.Parameter(self.mean * 0.9 + 0.1 * x.detach()[:3])
            self.embedding.weight = nn.Parameter(self.mean / self.size.unsqueeze(1))
        return x + self.embedding.weight.detach().sum(0)


LAYERS = {
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "spectral norm of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.utils.parametrizations.spectral_norm(nn.Conv1d(1, 1, 3, padding=1)), nn.Flatten()
    ),
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True, affine=True), nn.Flatten()
    ),
    "statistics": Statistics,
    "above": Above,
    "table": WithTable,
    "assigned": Assigned,
    **{f"codebook {how}": lambda how=how: Codebook(how) for how in ("in place", "data", "assigned", "always")},
}
MOVING = sorted(set(LAYERS) - {"weight norm"})


pytestmark = pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[request.param](), nn.Linear(4, 2))


def train(model, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).pow(2).mean().backward()
        optimizer.step()


def moved(model, before):
    return {name for name, value in model.state_dict().items() if value.numpy().tobytes() != before[name]}


def bits(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


layers = pytest.mark.parametrize("model", LAYERS, indirect=True)
moving = pytest.mark.parametrize("model", MOVING, indirect=True)


@layers
def test_what_is_frozen_does_not_move(model):
    before, listed = bits(model), freeze_(model, "0.**")
    assert set(listed) == {name for name in before if name.startswith("0.")}
    train(model)
    assert moved(model, before) == {"1.weight", "1.bias"}
    assert all(module.training for module in model.modules())
    assert list(model.state_dict()) == list(before)


@moving
def test_without_freezing_and_after_thawing_it_moves(model):
    attributes = [set(vars(module)) for module in model.modules()]
    twin = copy.deepcopy(model)
    buffers = {f"0.{name}" for name, _ in twin[0].named_buffers()} - {"0.constant"} or {"0.table.weight"}
    before = bits(twin)
    train(twin)
    assert moved(twin, before) & buffers
    freeze_(model, "0.**")
    train(model)
    unfreeze_(model, "0.**")
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._forward_hooks_always_called for module in model.modules())
    before = bits(model)
    train(model)
    assert moved(model, before) & buffers


@pytest.mark.parametrize("model", sorted(set(MOVING) - {"table"}), indirect=True)
def test_buffers_alone(model):
    names = [name for name, _ in model.named_buffers()]
    before = bits(model)
    assert freeze_(model, names) == names
    train(model)
    assert not moved(model, before) & set(names)
    assert moved(model, before) >= {"1.weight", "1.bias"}


@pytest.mark.parametrize("model", ["spectral norm by a hook", "codebook in place", "above"], indirect=True)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_frozen(model, copied):
    freeze_(model, "0.**")
    twin, before = copied(model), bits(model)
    train(twin)
    assert moved(twin, before) == {"1.weight", "1.bias"}
    assert bits(model) == before


@pytest.mark.parametrize("model", ["codebook in place"], indirect=True)
def test_a_part_thawed_alone_and_a_part_run_alone(model):
    freeze_(model, "**")
    before = bits(model)
    model[0](X)
    assert not moved(model, before)
    unfreeze_(model[0], "codebook")
    model(X)
    assert moved(model, before) == {"0.codebook"}


@pytest.mark.parametrize("model", ["codebook in place"], indirect=True)
def test_an_error_leaves_the_buffers_in_place(model):
    freeze_(model, "0.**")
    held = model[0].codebook
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 3))
    assert model[0].codebook is held
    train(model)
    assert model[0].codebook is held


@pytest.mark.parametrize("model", ["spectral norm", "spectral norm by a hook"], indirect=True)
def test_spectral_norm_divides_as_in_eval_mode(model):
    model(X)
    freeze_(model, "0.**")
    trained = model(X)
    assert torch.equal(trained, model.eval()(X))


def test_parameters_frozen_by_hand_cost_copies_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    freeze_(model, "0.**")
    model.eval()(X)
    assert model._forward_hooks and model[0]._forward_hooks
    model.train()(X)
    assert not model._forward_hooks and not model[0]._forward_hooks
    unfreeze_(model, "0.**")
    assert not model[0].weight.requires_grad  # as before


@pytest.mark.slow
@pytest.mark.parametrize("model", ["codebook in place"], indirect=True)
def test_compiled(model):
    freeze_(model, "0.**")
    before = bits(model)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        compiled(X).sum().backward()
        optimizer.step()
    assert moved(model, before) == {"1.weight", "1.bias"}


def test_statistics_that_are_not_held_are_not_listed():
    norm = nn.BatchNorm1d(4)
    assert freeze_(norm, "**", norm_stats=False) == ["weight", "bias"]
    assert freeze_(norm, "**") == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
