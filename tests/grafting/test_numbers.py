"""Numbers: the step of a run goes on in every form, an int or an array; settings stay the target's."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.serialization import msgpack_serialize, to_state_dict
from flax.training.train_state import TrainState

import paramend as pm
from paramend.errors import GraftRefused

OPTIMIZERS = {
    "no state": optax.sgd(0.1),
    "counts alone": optax.sgd(optax.linear_schedule(1.0, 0.0, 10)),
    "moments alone": optax.sgd(0.1, momentum=0.9),
    "moments and counts": optax.adam(0.1),
}
STEPS = {"int": 3, "numpy": np.int64(3), "jax": jnp.int32(3), "weak": jnp.asarray(3)}


def state(tx, step, value):
    params = {"Dense_0": {"kernel": np.full((2, 3), value, "float32")}}
    made = TrainState.create(apply_fn=None, params=params, tx=tx)
    counted = jax.tree.map(lambda leaf: leaf + 3 if leaf.ndim == 0 else leaf + value, made.opt_state)
    return made.replace(step=step, opt_state=counted if value else made.opt_state)


@pytest.mark.parametrize("tx", OPTIMIZERS)
@pytest.mark.parametrize("new", ["int", "jax"])
@pytest.mark.parametrize("old", STEPS)
def test_the_step_of_a_train_state_goes_on(tx, new, old):
    fresh = state(OPTIMIZERS[tx], 0 if new == "int" else jnp.int32(0), 0.0)
    source = state(OPTIMIZERS[tx], STEPS[old], 7.0)
    for given in (source, to_state_dict(source)):
        grown, report = pm.graft(fresh, given)
        assert int(grown.step) == 3 and isinstance(grown.step, int if new == "int" else jax.Array)
        assert [row.did.partition(",")[0] for row in report.copied if row.path == "step"] == ["copied"]
        assert not report.fresh and not report.unused
        assert jax.tree.leaves(grown.params)[0].tolist() == [[7.0] * 3] * 2
        wanted = jax.tree.leaves(source.opt_state)
        assert all(map(np.array_equal, jax.tree.leaves(grown.opt_state), wanted))


@pytest.mark.parametrize("step", [3, np.int32(3)])
@pytest.mark.parametrize("tx", OPTIMIZERS)
def test_the_step_goes_on_from_a_file(tx, step, tmp_path):
    path = tmp_path / "state.msgpack"
    path.write_bytes(msgpack_serialize(to_state_dict(state(OPTIMIZERS[tx], step, 7.0))))
    for new in (0, jnp.int32(0)):
        grown, report = pm.graft(state(OPTIMIZERS[tx], new, 0.0), pm.open(path))
        assert int(grown.step) == 3 and type(grown.step) is type(state(OPTIMIZERS[tx], new, 0.0).step)
        assert "step" in [row.path for row in report.copied] and not report.fresh


def test_the_epoch_of_a_torch_file_goes_on(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3, "lr": 0.5}, tmp_path / "old.pt")
    target = {"model": {"w": torch.zeros(2)}, "epoch": 0, "lr": 0.1}
    tree, report = pm.graft(target, pm.open(tmp_path / "old.pt"))
    assert (tree["epoch"], tree["lr"], tree["model"]["w"].tolist()) == (3, 0.1, [1, 1])
    assert [row.path for row in report.copied] == ["model.w", "epoch"]


def test_a_file_keeps_its_counters_and_the_report_says_so(tmp_path):
    for name, epoch in (("old", 3), ("new", 1)):
        torch.save({"model": {"w": torch.full((2,), float(epoch))}, "epoch": epoch, "lr": 0.5}, tmp_path / f"{name}.pt")
    old = torch.load(tmp_path / "old.pt", weights_only=True)
    for source in (old, pm.open(tmp_path / "old.pt")):
        made, report = pm.graft(pm.open(tmp_path / "new.pt"), source)
        assert made["model.w"].tolist() == [3, 3]
        assert [(row.path, row.did) for row in report.fresh] == [
            ("epoch", "a number in the file, which a graft leaves as it is")
        ]
    with pytest.raises(GraftRefused, match=r"goes nowhere in your model:\n  epoch"):
        pm.graft(pm.open(tmp_path / "new.pt"), {**old, "epoch": torch.tensor(3)})


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ({"step": 3}, {"step": 0}, 3),
        ({"step": np.array(3)}, {"step": 0}, 3),
        ({"step": torch.tensor(3)}, {"step": 0}, 3),
        ({"step": 3}, {"step": np.array(0)}, 3),
        ({"step": 3}, {"step": jnp.array(0)}, 3),
        ({"step": 3}, {"step": torch.tensor(0)}, 3),
        ({"width": np.array(3)}, {"width": 1}, 3),  # an array is a leaf of the source, and must go somewhere
        ({"width": 3}, {"width": 1}, 1),  # settings, of which the target has its own
        ({"scale": 2.5}, {"scale": np.array(1.0)}, 2.5),
        ({"flag": True}, {"flag": False}, False),
    ],
)
def test_numbers_and_arrays_without_axes(old, new, wanted):
    (name,) = old
    tree, report = pm.graft({"w": np.zeros(2), **new}, {"w": np.ones(2), **old})
    assert tree[name] == wanted and isinstance(tree[name], type(new[name]))
    assert (name in [row.path for row in report.copied]) == (wanted not in (1, False))


def test_settings_in_modules_stay_beside_an_optimizer_whose_numbers_go_on():
    @flax.struct.dataclass
    class Layer:
        w: np.ndarray
        rate: float

    def run(value, rate, best):
        layer = Layer(np.full(2, value), rate)
        return {"model": layer, "best": best, "opt": optax.sgd(0.1).init(layer)}

    tree, report = pm.graft(run(0.0, 0.1, 0.0), run(1.0, 0.5, 0.25))
    assert (tree["model"].rate, tree["best"], tree["model"].w.tolist()) == (0.1, 0.25, [1, 1])
    assert [row.path for row in report.copied] == ["model/w", "best"]


def test_a_number_whose_name_changes_or_that_is_not_selected():
    old = {"run": {"w": np.ones(2), "step": 3}}
    tree, _ = pm.graft({"w": np.zeros(2), "step": 0}, old, rename={"run/**": "**"})
    assert tree["step"] == 3
    tree, report = pm.graft({"w": np.zeros(2), "step": 0}, {"w": np.ones(2), "step": np.array(3)}, only="w")
    assert tree["step"] == 0 and [row.did for row in report.unused] == ["outside `only`"]


def test_a_number_has_no_place_for_an_array_and_changes_in_place_where_its_container_does():
    with pytest.raises(GraftRefused, match=r"a shape differs:\n  step  your model int32\[\], the source int64\[2\]"):
        pm.graft({"w": np.zeros(2), "step": 0}, {"w": np.ones(2), "step": np.array([1, 2])})
    target = (np.zeros(2), {"step": 0, "epochs": [{"epoch": 1}]}, 0)
    with pytest.raises(GraftRefused, match="a Python int never does, nor what holds it") as caught:
        pm.graft_({"run": target}, {"run": {"0": np.ones(2), "1": {"step": 3}, "2": np.array(4)}})
    assert target[0].tolist() == [0, 0]
    assert "pm.graft(target, source) gives a new tree" in caught.value.hint
    report = pm.graft_(target, {"0": np.ones(2), "1": {"step": 3, "epochs": [{"epoch": np.array(5)}]}})
    assert (target[0].tolist(), target[1]) == ([1, 1], {"step": 3, "epochs": [{"epoch": 5}]})
    assert [row.path for row in report.copied] == ["0", "1/step", "1/epochs/0/epoch"]


def test_a_traced_step():
    def grafted(step):
        return pm.graft({"w": jnp.zeros(2), "step": 0}, {"w": jnp.ones(2), "step": step})[0]

    assert int(jax.jit(grafted)(jnp.int32(3))["step"]) == 3
