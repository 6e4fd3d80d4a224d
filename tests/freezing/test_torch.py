"""Frozen leaves of torch modules stay bit for bit: under every optimizer, in train mode, copied and pickled."""

import copy
import inspect
import pickle

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

from paramend.errors import BadArgument, NoMatch, SelectorError, Unsupported
from paramend.freezing.freeze import freeze, freeze_, unfreeze_
from paramend.selectors.selector import sel
from support.numerics import assert_close

OPTIMIZERS = {
    name: make
    for name, make in vars(torch.optim).items()
    if inspect.isclass(make) and issubclass(make, torch.optim.Optimizer) and make is not torch.optim.Optimizer
}
OPTIMIZERS.pop("SparseAdam")  # takes sparse gradients only: below


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))


def made(name, params):
    """The optimizer with decay and momentum where it takes them."""
    takes = inspect.signature(OPTIMIZERS[name]).parameters
    wanted = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "max_iter": 3}
    return OPTIMIZERS[name](params, **{key: value for key, value in wanted.items() if key in takes})


X = torch.linspace(-1, 1, 15).reshape(5, 3)


def train(model, optimizer, steps=5, set_to_none=True):
    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = ((model(X) - 1) ** 2).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def bits(module):
    return {name: t.detach().cpu().numpy().tobytes() for name, t in module.state_dict().items()}


def grads(module):
    return [name for name, p in module.named_parameters() if p.requires_grad]


# ---- every optimizer -------------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_from_the_start(name, set_to_none):
    model = net(bias=name != "Muon")  # Muon takes matrices only
    twin = copy.deepcopy(model)
    optimizer = made(name, model.parameters())
    before = bits(model[0])
    freeze_(model, "0.**")
    train(model, optimizer, set_to_none=set_to_none)
    assert bits(model[0]) == before
    for p in twin[0].parameters():
        p.requires_grad_(False)
    train(twin, made(name, twin[2].parameters()), set_to_none=set_to_none)
    for p, q in zip(model[2].parameters(), twin[2].parameters(), strict=True):
        assert_close(p, q, terms=5 * (2 * (3 + 4 + 5) + 20), scale=2)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"LBFGS"}))
def test_frozen_in_mid_run(name, set_to_none):
    model = net(bias=name != "Muon")
    optimizer = made(name, model.parameters())
    train(model, optimizer, 3, set_to_none)
    before = bits(model)
    freeze_(model, "0.**")
    train(model, optimizer, 5, set_to_none)
    after = bits(model)
    assert {key for key in after if after[key] != before[key]} == {key for key in after if key.startswith("2.")}


def test_sparse_adam():
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Embedding(4, 2, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        (model[0](torch.tensor([1])) + model[1](torch.tensor([2]))).sum().backward()
        optimizer.step()

    step()
    before = bits(model)
    freeze_(model, "0.weight")
    step()
    assert bits(model)["0.weight"] == before["0.weight"]
    assert bits(model)["1.weight"] != before["1.weight"]


@pytest.mark.parametrize("cleared", [True, False])
def test_lbfgs_keeps_a_history_of_all_parameters(cleared):
    """As the documentation of `freeze_` says: frozen in mid-run, clear the state."""
    model = net()
    optimizer = made("LBFGS", model.parameters())
    train(model, optimizer, 3)
    freeze_(model, "0.**")
    before = bits(model)
    if cleared:
        optimizer.state.clear()
    train(model, optimizer)
    assert (bits(model)["0.weight"] == before["0.weight"]) == cleared
    assert bits(model)["2.weight"] != before["2.weight"]


def test_what_goes_wrong_by_hand():
    """Why there is a verb: requires_grad alone leaves a gradient behind, and zero is a gradient, too."""
    for forget in ("grad", "zero_grad"):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(model, optimizer, 3, set_to_none=False)
        before = bits(model[0])
        model[0].requires_grad_(False)
        if forget == "grad":
            optimizer.step()
        else:
            train(model, optimizer, 1, set_to_none=False)
        assert bits(model[0]) != before
    for zeros in (True, False):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        if zeros:
            model[0].weight.register_hook(torch.zeros_like)
        else:
            freeze_(model, "0.weight")
        before = bits(model)["0.weight"]
        train(model, optimizer)
        assert (bits(model)["0.weight"] != before) == zeros


# ---- parameters ------------------------------------------------------------------------------------------------


def test_parameters_keep_all_but_their_gradient():
    model = net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    before, objects = bits(model), list(model.parameters())
    assert freeze_(model, "0.*") == ["0.weight", "0.bias"]
    assert bits(model) == before
    assert all(one is other for one, other in zip(model.parameters(), objects, strict=True))
    assert grads(model) == ["2.weight", "2.bias"]
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    assert freeze_(model, "0.*") == ["0.weight", "0.bias"]
    assert unfreeze_(model, "0.bias") == ["0.bias"]
    assert grads(model) == ["0.bias", "2.weight", "2.bias"]


def test_frozen_between_forward_and_backward():
    model = net()
    loss = model(X).sum()
    freeze_(model, "0.**")
    loss.backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_thawed_parameters_train_again():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    freeze_(model, "**")
    unfreeze_(model, "**")
    before = bits(model)
    train(model, optimizer, 1)
    assert all(bits(model)[name] != before[name] for name in before)


class Tied(nn.Module):
    def __init__(self, same=True):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight if same else nn.Parameter(self.embed.weight.data)

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("selector", ["*.weight", ["head.weight", "embed.weight"], "**"])
def test_tied_parameters_are_frozen_once_under_all_names(selector, same):
    model = Tied(same)  # one parameter, or two that share their memory
    assert freeze_(model, selector) == ["embed.weight"]
    assert not model.embed.weight.requires_grad
    assert not model.head.weight.requires_grad
    unfreeze_(model, selector)
    assert model.embed.weight.requires_grad
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("selector", ["embed.weight", "head.weight", nn.Linear])
def test_half_of_a_tied_pair_is_refused(selector, same):
    model = Tied(same)
    with pytest.raises(BadArgument, match="tied") as caught:
        freeze_(model, selector)
    assert "embed.weight" in str(caught.value)
    assert "head.weight" in str(caught.value)
    assert len(grads(model)) == (1 if same else 2)
    if isinstance(selector, str):
        assert eval(caught.value.hint.partition(": ")[2], {"pm": HINTS, "module": model})
        assert not grads(model)


def test_a_module_twice_in_a_model():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(BadArgument, match=r"0\.weight"):
        freeze_(model, "2.*")
    assert freeze_(model, "{0,2}.*") == ["0.weight", "0.bias"]
    assert not grads(model)


def test_integers_have_no_gradients_to_take_or_give():
    model = nn.Module()
    model.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    model.register_buffer("steps", torch.tensor(3))
    assert freeze_(model, "**") == ["codes", "phase", "steps"]
    assert not grads(model)
    unfreeze_(model, "**")
    assert grads(model) == ["phase"]


@pytest.mark.parametrize(
    "selector",
    ["0.**", ["0.weight", "0.bias"], sel("**") & ~sel("2.**"), lambda path, spec: path[0] == "0", "[0].*"],
)
def test_selectors_of_every_kind(selector):
    model = net()
    freeze_(model, selector)
    assert grads(model) == ["2.weight", "2.bias"]


def test_module_classes():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    assert freeze_(model, nn.Linear) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert grads(model) == ["1.weight", "1.bias"]


# ---- normalization layers ----------------------------------------------------------------------------------------

NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "plain": lambda: nn.BatchNorm1d(3, affine=False),
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "BatchNorm3d": lambda: nn.BatchNorm3d(3),
    "InstanceNorm": lambda: nn.InstanceNorm1d(3, track_running_stats=True, affine=True),
    "subclass": lambda: type("MyNorm", (nn.BatchNorm1d,), {})(3),
}


def batch(norm):
    dims = {"BatchNorm2d": 4, "BatchNorm3d": 5, "InstanceNorm1d": 3}.get(type(norm).__name__, 2)
    return torch.randn(6, 3, *[2] * (dims - 2)) * 3 + 1


def statistics(norm):
    return {name: t.numpy().tobytes() for name, t in norm.named_buffers()}


@pytest.mark.numeric
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_statistics_stay_in_train_mode(make):
    model = nn.Sequential(nn.Identity(), make())
    x = batch(model[1])
    model(x)
    before, keys, kind = statistics(model[1]), list(model.state_dict()), type(model[1])
    freeze_(model, "1.**")
    model.train()
    y = model(x)
    assert statistics(model[1]) == before
    assert model[1].training  # the mode is what the user said
    model.eval()
    assert_close(y, model(x), terms=4, scale=10)  # and the layer normalizes as in eval mode
    assert list(model.state_dict()) == keys
    assert type(model[1]) is kind
    model.train()
    unfreeze_(model, "1.**")
    model(x)
    assert statistics(model[1]) != before


def test_synchronized_batch_norm():
    # Its forward demands a GPU in train mode; frozen, it is as in eval mode.
    norm = nn.SyncBatchNorm(3)
    before = statistics(norm)
    freeze_(norm, "**")
    norm(batch(norm))
    assert statistics(norm) == before


def test_statistics_move_on_when_only_weight_and_bias_are_frozen():
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = statistics(model[0])
    freeze_(model, "0.{weight,bias}")
    model(batch(model[0]))
    assert statistics(model[0]) != before


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_statistics_of_a_layer_stay_together(name):
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = statistics(model[0])
    assert freeze_(model, f"0.{name}") == [f"0.{name}"]
    assert grads(model) == ["0.weight", "0.bias"]
    model(batch(model[0]))
    assert statistics(model[0]) == before


def test_weight_and_bias_train_over_held_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze_(model, "0.running_*")
    before = bits(model)
    model(batch(model[0])).pow(2).sum().backward()
    optimizer.step()
    assert {name for name, value in bits(model).items() if value != before[name]} == {"0.weight", "0.bias"}


def test_only_the_chosen_layers_are_held():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = statistics(model[1])
    freeze_(model, "0.**")
    model(batch(model[0]))
    assert statistics(model[1]) != before
    assert model[2].training


def test_frozen_twice_and_thawed_once():
    norm = nn.BatchNorm1d(3)
    freeze_(norm, "**")
    freeze_(norm, "**")
    hooks = len(norm._forward_pre_hooks) + len(norm._forward_hooks)
    assert hooks == 2
    before = set(vars(nn.BatchNorm1d(3)))
    unfreeze_(norm, "**")
    unfreeze_(norm, "**")
    assert not norm._forward_pre_hooks
    assert not norm._forward_hooks
    assert not norm._forward_hooks_always_called
    assert set(vars(norm)) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_frozen_and_can_be_thawed(copied):
    model = nn.Sequential(nn.BatchNorm1d(3))
    freeze_(model, "**")
    twin = copied(model)
    before = statistics(twin[0])
    x = batch(twin[0])
    twin(x)
    assert statistics(twin[0]) == before
    freeze_(twin, "**")
    assert len(twin[0]._forward_hooks) == 1
    unfreeze_(twin, "**")
    twin(x)
    assert statistics(twin[0]) != before
    model(x)
    assert statistics(model[0]) == before  # thawing the copy left the original frozen


def test_hooks_of_others_stay():
    norm = nn.BatchNorm1d(3)
    seen = []
    norm.register_forward_pre_hook(lambda layer, args: seen.append("before"))
    norm.register_forward_hook(lambda layer, args, output: seen.append("after"))
    freeze_(norm, "**")
    norm(batch(norm))
    unfreeze_(norm, "**")
    norm(batch(norm))
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("fails", ["forward", "hook"])
def test_the_mode_survives_a_failure(fails):
    norm = nn.BatchNorm1d(3)
    if fails == "hook":
        norm.register_forward_pre_hook(lambda layer, args: args[0].no_such_attribute)
    freeze_(norm, "**")
    for training in (True, False):
        norm.train(training)
        with pytest.raises((ValueError, RuntimeError, AttributeError)):
            norm(torch.ones(1, 2, 3, 4, 5))
        assert norm.training == training
    assert not hasattr(norm, "_trains_outside")


def test_a_state_dict_goes_in_and_out():
    model, other = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    other(batch(other[0]))
    freeze_(model, "**")
    model.load_state_dict(other.state_dict())
    assert bits(model) == bits(other)
    model(batch(model[0]))
    assert bits(model) == bits(other)


@pytest.mark.numeric
def test_compiled():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    freeze_(model, "1.**")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(6, 3)
    before = statistics(model[1])
    assert_close(compiled(x), model(x), terms=3 + 4, scale=4)
    assert statistics(model[1]) == before
    assert model[1].training


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [freeze_, unfreeze_])
def test_nothing_selected(verb):
    model = net()
    with pytest.raises(NoMatch):
        verb(model, "1.**")
    with pytest.raises(SelectorError):
        verb(model, "0.[")
    with pytest.raises(NoMatch):
        verb(model, ["0.**", "7.**"])
    assert len(grads(model)) == 4  # all or nothing


class HINTS:  # what hints call `pm`
    freeze, freeze_, unfreeze_, sel = map(staticmethod, (freeze, freeze_, unfreeze_, sel))


@pytest.mark.parametrize("verb", [freeze_, unfreeze_])
@pytest.mark.parametrize(
    "wrong",
    [{"a": {"w": jnp.ones(2)}}, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.adam(0.1), nn.Linear, torch.ones(2), "model"],
)
def test_no_torch_module(verb, wrong):
    with pytest.raises(Unsupported, match="torch module") as caught:
        verb(wrong, "a/**")
    names = {"pm": HINTS, "optax": optax}
    exec(caught.value.hint.partition(": ")[2], names)
    names["tx"].init({"a": {"w": jnp.ones(2)}, "b": jnp.ones(2)})


def test_a_torch_module_where_a_transformation_belongs():
    with pytest.raises(Unsupported) as caught:
        freeze(net(), "0.**")
    assert caught.value.hint == 'pm.freeze_(module, "0.**")'
    assert eval(caught.value.hint, {"pm": HINTS, "module": net()}) == ["0.weight", "0.bias"]


def test_bits_are_not_read_or_written():
    model = net()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-0.0, torch.nan, torch.inf]).expand(4, 3))
    before = model[0].weight.detach().numpy().tobytes()
    version = model[0].weight._version
    freeze_(model, "**")
    unfreeze_(model, "**")
    assert model[0].weight._version == version
    assert np.asarray(model[0].weight.detach()).tobytes() == before
