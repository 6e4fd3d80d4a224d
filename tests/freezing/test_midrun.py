"""Torch in mid-run: slices, optimizer states dropped, kept and carried, what was before restored."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn

from paramend.errors import BadArgument, GraftRefused, OutOfRange, SpecMismatch, Unsupported
from paramend.freezing.freeze import freeze_, unfreeze_
from paramend.grafting.graft import graft_
from paramend.grafting.states.verbs import graft_optimizer_
from paramend.selectors.selector import sel

OPTIMIZERS = {
    name: make
    for name, make in vars(torch.optim).items()
    if inspect.isclass(make) and issubclass(make, torch.optim.Optimizer) and make is not torch.optim.Optimizer
}
OPTIMIZERS.pop("SparseAdam")
OF_ONE = sorted(set(OPTIMIZERS) - {"LBFGS"})
X = torch.linspace(-1, 1, 15).reshape(5, 3)


class HINTS:  # what hints call `pm`
    freeze_, unfreeze_, graft_optimizer_ = map(staticmethod, (freeze_, unfreeze_, graft_optimizer_))


def carried(optimizer, old, module=None, names=None):
    """The optimizer, with what an earlier one has for its parameters."""
    graft_optimizer_(optimizer, old, target=module, names=names)
    return optimizer


def net(bias=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))


def made(name, params, **more):
    takes = inspect.signature(OPTIMIZERS[name]).parameters
    wanted = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "max_iter": 3}
    return OPTIMIZERS[name](params, **{key: value for key, value in wanted.items() if key in takes}, **more)


def train(model, optimizer, steps=3, set_to_none=True):
    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = ((model(X) - 1) ** 2).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def bits(tensor):
    return tensor.detach().numpy().tobytes()


# ---- slices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("midrun", [False, True])
def test_rows_stay_in_every_optimizer(name, midrun):
    model = net()
    optimizer = made(name, model.parameters())
    if midrun:
        train(model, optimizer)
    before = model[0].weight.detach().clone()
    assert freeze_(model, sel("0.weight")[:2], optimizer=optimizer) == ["0.weight"]
    train(model, optimizer, 4, set_to_none=False)
    assert bits(model[0].weight[:2]) == bits(before[:2])
    assert (model[0].weight[2:] != before[2:]).all()
    assert model[0].weight.requires_grad


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_the_other_rows_train_as_without(name):
    model, twin = net(), net()
    one, other = made(name, model.parameters()), made(name, twin.parameters())
    freeze_(model, sel("0.weight")[:2], optimizer=one)
    for net_, optimizer in ((model, one), (twin, other)):
        for p in net_.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert bits(model[0].weight[2:]) == bits(twin[0].weight[2:])


def test_by_a_gradient_hook_rows_decay():
    model = net()
    model[0].weight.register_hook(lambda g: torch.cat([torch.zeros_like(g[:2]), g[2:]]))
    before = bits(model[0].weight[:2])
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
    assert bits(model[0].weight[:2]) != before


def test_slices_are_thawed():
    model = net()
    optimizer = made("AdamW", model.parameters())
    freeze_(model, sel("0.weight")[:2], optimizer=optimizer)
    freeze_(model, sel("*.weight")[-1], optimizer=optimizer)
    before = model[0].weight.detach().clone()
    unfreeze_(model, sel("0.weight")[:2], optimizer=optimizer)
    train(model, optimizer)
    assert (model[0].weight[:2] != before[:2]).all()
    assert bits(model[0].weight[-1]) == bits(before[-1])
    unfreeze_(model, "**", optimizer=optimizer)
    train(model, optimizer)
    assert (model[0].weight[-1] != before[-1]).all()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_slices_with_gradient_accumulation_and_a_rate_schedule():
    model = net()
    optimizer = made("AdamW", model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    freeze_(model, sel("0.weight")[..., 0], optimizer=optimizer)
    before = model[0].weight.detach().clone()
    for number in range(4):
        model(X).sum().backward()
        if number % 2:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert bits(model[0].weight[:, 0].contiguous()) == bits(before[:, 0].contiguous())
    assert (model[0].weight[:, 1:] != before[:, 1:]).all()


def test_slices_that_cannot_be():
    model = net()
    optimizer = made("SGD", model[2].parameters())
    for verb in (freeze_, unfreeze_):
        with pytest.raises(Unsupported, match=r"a slice \[:2\]") as caught:
            verb(model, sel("0.weight")[:2])
        selector, own = sel("0.weight")[:2], made("SGD", model.parameters())
        eval(caught.value.hint, {"pm": HINTS, "module": model, "selector": selector, "optimizer": own})
    with pytest.raises(BadArgument, match=r"does not hold 0\.weight"):
        freeze_(model, sel("0.weight")[:2], optimizer=optimizer)
    with pytest.raises(OutOfRange, match=r"2\.weight: .*\(2, 4\)"):
        freeze_(model, sel("2.weight")[7], optimizer=optimizer)


# ---- the optimizer in use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_frozen_parameters_is_dropped_or_kept(name, keep):
    model = net()
    optimizer = made(name, model.parameters())
    train(model, optimizer)
    before = bits(model[0].weight)
    freeze_(model, "0.*", optimizer=optimizer, keep_state=keep)
    if name != "LBFGS":  # there all is forgotten
        assert (model[0].weight in optimizer.state) == keep or name == "SGD"
        assert model[2].weight in optimizer.state
    train(model, optimizer)
    assert bits(model[0].weight) == before
    unfreeze_(model, "0.*", optimizer=optimizer)
    train(model, optimizer, 1)
    assert bits(model[0].weight) != before


def test_the_optimizer_of_another_model():
    with pytest.raises(BadArgument, match=r"holds none of the selected parameters: 0\.weight"):
        freeze_(net(), "0.*", optimizer=made("SGD", net().parameters()))


def test_statistics_may_move_on():
    model = nn.Sequential(nn.BatchNorm1d(3))
    freeze_(model, "**", norm_stats=False)
    before = bits(model[0].running_mean)
    model(X)
    assert bits(model[0].running_mean) != before
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
def test_what_was_frozen_before_stays_frozen(copied):
    model = net()
    keys = list(model.state_dict())
    model[0].weight.requires_grad_(False)
    freeze_(model, "**")
    freeze_(model, "**")
    model = copied(model)
    unfreeze_(model, "**")
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    unfreeze_(model, "**")  # now nothing is known of it any more
    assert [p.requires_grad for p in model.parameters()] == [True, True]
    assert list(model.state_dict()) == keys
    assert set(vars(model[0])) == set(vars(nn.Linear(1, 1)))


# ---- carried -----------------------------------------------------------------------------------------------------


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert bits(value) == bits(other[key])
            assert value is not other[key]
        else:
            assert value == other[key]


@pytest.mark.parametrize("name", OF_ONE)
def test_thawed_into_an_optimizer_of_all(name):
    model = net()
    freeze_(model, "0.*")
    old = made(name, [p for p in model.parameters() if p.requires_grad])
    train(model, old)
    unfreeze_(model, "0.*")
    new = made(name, model.parameters())
    report = graft_optimizer_(new, old)
    assert {row.path.rpartition(".")[0] for row in report.copied} <= {"#1"}
    if old.state[model[2].weight]:
        same(new.state[model[2].weight], old.state[model[2].weight])
    train(model, new)
    freeze_(model, "2.*")
    frozen = carried(made(name, model[0].parameters()), new)
    assert list(frozen.state) == [model[0].weight] or not frozen.state
    train(model, frozen)


@pytest.mark.numeric
def test_trained_parameters_go_on_as_if_nothing_had_happened():
    model, twin = net(), net()
    one, other = made("AdamW", model[2].parameters()), made("AdamW", twin[2].parameters())
    train(model, one)
    train(model, carried(made("AdamW", model[2].parameters()), one))
    train(twin, other, 6)
    assert bits(model[2].weight) == bits(twin[2].weight)


@pytest.mark.parametrize("how", ["named", "module", "order"])
def test_resumed_from_a_file(how):
    model = net()
    old = made("AdamW", model[2].named_parameters(prefix="2") if how == "named" else model[2].parameters())
    train(model, old)
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = copy.deepcopy(model)
    if how == "named":
        new = carried(made("AdamW", resumed.named_parameters()), saved)
    elif how == "module":
        new = carried(made("AdamW", resumed.parameters()), saved, module=resumed, names=["2.weight"])
    else:
        new = carried(made("AdamW", resumed[2].parameters()), saved)
    same(new.state[resumed[2].weight], old.state[model[2].weight])
    train(resumed, new)


class Swapped(nn.Module):
    """Two layers of one shape, registered in either order."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2, bias=False))


def swapped(*names, named=False):
    """A module, and its optimizer after a step in which each layer had a gradient of its own."""
    module = Swapped(*names)
    optimizer = torch.optim.AdamW(module.named_parameters() if named else module.parameters())
    for name, layer in module.named_children():
        layer.weight.grad = torch.full((2, 2), {"a": 1.0, "b": 3.0}[name])
    optimizer.step()
    return module, optimizer


def by_name(state_dict, names):
    """The state dict with names for numbers, as torch.distributed writes it."""
    groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state_dict["param_groups"]]
    return {"state": {names[n]: state for n, state in state_dict["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("case", ["old", "new", "groups", "sizes of groups", "twice"])
def test_moments_are_not_matched_by_an_order_that_may_be_another(case):
    _, old = swapped("a", "b", named=case == "old")
    new = Swapped("b", "a")
    if case in ("groups", "sizes of groups"):
        groups = [{"params": [new.a.weight, new.b.weight]}, {"params": []}]
        groups = [{"params": [p]} for p in new.parameters()] if case == "groups" else groups
    else:
        groups = new.named_parameters() if case in ("new", "twice") else new.parameters()
    optimizer = torch.optim.AdamW(groups)
    names = ["a.weight", "a.weight"] if case == "twice" else None
    for source in (old, old.state_dict()):
        with pytest.raises(BadArgument, match="1 name for the 2" if names else "which is which"):
            graft_optimizer_(optimizer, source, names=names)
    assert not optimizer.state


@pytest.mark.parametrize("case", ["named", "names", "modules", "distributed"])
def test_moments_follow_names_whatever_the_order(case):
    module, old = swapped("a", "b", named=case == "named")
    new = Swapped("b", "a")
    optimizer = torch.optim.AdamW(new.parameters() if case == "modules" else new.named_parameters())
    names = [name for name, _ in module.named_parameters()]
    if case == "modules":
        graft_optimizer_(optimizer, old, target=new, source=module)
    elif case == "distributed":
        graft_optimizer_(optimizer, by_name(old.state_dict(), names))
    else:
        graft_optimizer_(optimizer, old.state_dict(), names=names if case == "names" else None)
    for name in ("a", "b"):
        same(optimizer.state[new.get_submodule(name).weight], old.state[module.get_submodule(name).weight])


def test_without_any_names_the_order_counts_as_in_torch_and_the_report_says_so():
    _, old = swapped("a", "b")
    new, other = (torch.optim.AdamW(Swapped("a", "b").parameters()) for _ in range(2))
    report = graft_optimizer_(new, old.state_dict())
    other.load_state_dict(old.state_dict())
    for one, twin in zip(new.state.values(), other.state.values(), strict=True):
        same(one, twin)
    assert {row.did for row in report.copied} == {"copied by order"}


@pytest.mark.parametrize("how", ["by name", "after a graft"])
def test_a_step_that_was_saved_as_a_number_goes_on(how):
    module, old = swapped("a", "b", named=True)
    saved = old.state_dict()
    saved["state"] = {n: {**state, "step": int(state["step"])} for n, state in saved["state"].items()}
    new = Swapped("a", "b")
    optimizer, other = (torch.optim.AdamW(new.named_parameters()) for _ in range(2))
    report = graft_(new, module) if how == "after a graft" else None
    said = graft_optimizer_(optimizer, saved, report)
    other.load_state_dict(saved)
    same(optimizer.state[new.a.weight], other.state[new.a.weight])
    assert "a.weight.step" in [row.path for row in said.copied]


def test_moments_of_another_kind_of_optimizer_are_refused():
    _, old = swapped("a", "b")
    optimizer = torch.optim.SGD(Swapped("a", "b").parameters(), momentum=0.9)
    for source in (old, old.state_dict()):
        with pytest.raises(GraftRefused, match="moments differ"):
            graft_optimizer_(optimizer, source)
    scheduled = torch.optim.AdamW(Swapped("a", "b").parameters())
    torch.optim.lr_scheduler.OneCycleLR(scheduled, 0.1, total_steps=3)
    for parameter in scheduled.param_groups[0]["params"]:
        parameter.grad = torch.ones(2, 2)
    scheduled.step()
    report = graft_optimizer_(torch.optim.AdamW(Swapped("a", "b").parameters()), scheduled.state_dict())
    assert len(report.copied) == 6


def test_groups():
    model = net(bias=True)
    old = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 0.5, "betas": (0.8, 0.9)},
            {"params": model[2].parameters(), "lr": 0.25, "weight_decay": 0.5},
        ]
    )
    torch.optim.lr_scheduler.StepLR(old, 1)
    train(model, old, 1)
    new = torch.optim.AdamW([{"params": model[2].parameters()}, {"params": model[0].parameters()}], foreach=False)
    carried(new, old)
    assert [group["lr"] for group in new.param_groups] == [0.25, 0.5]
    assert [group["initial_lr"] for group in new.param_groups] == [0.25, 0.5]
    assert new.param_groups[0]["weight_decay"] == 0.5
    assert new.param_groups[1]["betas"] == (0.8, 0.9)
    assert new.param_groups[0]["foreach"] is False
    merged = carried(torch.optim.AdamW(model.parameters(), lr=0.125), old)
    assert merged.param_groups[0]["lr"] == 0.125  # of two groups: it is ambiguous whose rate to take
    assert len(merged.state) == 4


def test_lbfgs_is_carried_whole_or_not_at_all():
    model = net()
    old = made("LBFGS", model.parameters())
    train(model, old)
    new = carried(made("LBFGS", model.parameters()), old)
    twin, other = copy.deepcopy(model), copy.deepcopy(old)
    train(model, new, 1)
    assert bits(twin[0].weight) != bits(model[0].weight)
    assert other.state
    part = carried(made("LBFGS", model[2].parameters()), old)
    assert not part.state
    train(model, part, 1)


def test_torch_takes_moments_of_any_shape():
    """The fact that `graft_optimizer_` without a report is there for."""
    model, wide = nn.Linear(4, 2, bias=False), nn.Linear(4, 3, bias=False)
    old = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    old.step()
    torch.optim.AdamW(wide.parameters()).load_state_dict(old.state_dict())
    new = torch.optim.AdamW(wide.parameters(), lr=0.5)
    state_dict = old.state_dict()
    with pytest.raises(SpecMismatch, match=r"exp_avg of parameter 0 is \[2, 4\], and the parameter \[3, 4\]") as caught:
        carried(new, state_dict)
    assert not new.state
    assert new.param_groups[0]["lr"] == 0.5
    exec(caught.value.hint.partition(": ")[2], {"state_dict": state_dict, "number": 0})
    carried(new, state_dict)


def test_nothing_belongs_together():
    model = net()
    old = made("AdamW", model.named_parameters())
    train(model, old, 1)
    with pytest.raises(BadArgument, match="nothing for the 2 parameters"):
        carried(made("AdamW", net(bias=True)[0].named_parameters(prefix="other")), old)
    with pytest.raises(BadArgument, match="which is which"):
        carried(made("AdamW", net(bias=True).parameters()), old)
    with pytest.raises(BadArgument, match="3 names for the 2 parameters"):
        carried(made("AdamW", net().parameters()), old, module=net(), names=["a", "b", "c"])
    for wrong in (model, {"state": {}}, torch.optim.AdamW):
        with pytest.raises(Unsupported):
            carried(old, wrong)
        with pytest.raises(Unsupported):
            carried(wrong, old)


# ---- compiled ----------------------------------------------------------------------------------------------------


def test_compiled_models_freeze_and_thaw():
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = made("AdamW", model.parameters())
    train(compiled, optimizer, 1)
    before = bits(model[0].weight)
    freeze_(model, "0.*", optimizer=optimizer)
    train(compiled, optimizer, 2)
    assert bits(model[0].weight) == before
    unfreeze_(model, "0.*")
    train(compiled, optimizer, 1)
    assert bits(model[0].weight) != before


def test_what_is_left_over_is_refused_if_asked_before_anything_changes():
    model = net()
    old = made("AdamW", model.parameters())
    train(model, old, 1)
    new = made("AdamW", model[2].parameters())
    with pytest.raises(GraftRefused, match="no place here") as caught:
        graft_optimizer_(new, old, unused="error")
    assert not new.state
    assert len(caught.value.report.unused) == 3
    assert len(graft_optimizer_(new, old).unused) == 3
