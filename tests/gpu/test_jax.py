"""JAX on a device that is not the default: edits, donation, optimizer state and grafts stay on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import paramend as pm
from paramend.edits.ops import OPS

VALUES = np.arange(32, dtype="float32").reshape(4, 8) / 32
ARGS = {
    "fill": [0.5],
    "set": [VALUES[::-1]],
    "add": [0.5],
    "project_out": [[1.0, 0, 0, 2], 1.0, 0],
    "multiply": [0.5],
    "clip": [0.1, 0.2],
    "apply": [lambda x: x + 1],
    "cast": ["float16"],
    "noise": [0.1],
    "reinit": ["lecun_normal"],
    "transpose": [(1, 0)],
    "reshape": [(8, 4)],
    "take": [[2, 0]],
    "permute": [[3, 1, 0, 2]],
}


def on(device, value=VALUES):
    return jax.device_put(value, device)


@pytest.mark.parametrize("verb", OPS)
def test_a_verb_leaves_arrays_on_their_device(verb, device):
    tree = {"w": on(device), "b": on(device, VALUES[0])}
    made = getattr(pm.at(tree, "w"), verb)(*ARGS.get(verb, ()))["w"]
    assert made.sharding == tree["w"].sharding and made.committed
    host = getattr(pm.at({"w": VALUES, "b": VALUES[0]}, "w"), verb)(*ARGS.get(verb, ()))["w"]
    assert made.dtype == host.dtype and made.shape == host.shape
    if verb not in ("project_out", "noise"):  # which compute with another rounding
        np.testing.assert_array_equal(made, host)


SAME_AXES = [name for name in OPS if name not in ("transpose", "reshape")]


@pytest.mark.parametrize("verb", SAME_AXES)
def test_a_verb_keeps_the_order_of_axes_in_memory(verb, device):
    layout = Format(Layout(major_to_minor=(1, 0)), SingleDeviceSharding(device))
    tree = {"w": jax.device_put(VALUES, layout)}
    made = getattr(pm.at(tree, "w"), verb)(*ARGS.get(verb, ()))["w"]
    assert made.format.layout.major_to_minor == (1, 0) and made.sharding == tree["w"].sharding


@pytest.mark.parametrize("verb", ["zero", "fill", "add", "multiply", "clip"])
def test_an_edit_of_a_slice_keeps_the_order_of_axes_in_memory(verb, device):
    layout = Format(Layout(major_to_minor=(1, 0)), SingleDeviceSharding(device))
    made = getattr(pm.at({"w": jax.device_put(VALUES, layout)}, "w")[1:3], verb)(*ARGS.get(verb, ()))["w"]
    assert made.format.layout.major_to_minor == (1, 0) and made.sharding.device_set == {device}


def test_an_array_on_the_host_stays_there_beside_one_on_the_device(device):
    host = jax.devices("cpu")[0]
    made = pm.at({"there": on(device), "here": on(host)}, "**").multiply(2.0)
    assert made["there"].devices() == {device} and made["here"].devices() == {host}
    made = pm.at({"there": on(device), "here": on(host)}, "**").set({"there": on(host), "here": on(device)})
    assert made["there"].devices() == {device} and made["here"].devices() == {host}


def test_a_sharding_over_all_devices_of_the_kind_is_kept(device):
    devices = jax.devices(device.platform)
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    tree = {"w": jax.device_put(np.ones((4, 8 * len(devices)), "float32"), sharding)}
    for made in (pm.at(tree, "w").multiply(0.5), pm.at(tree, "w").zero(), pm.at(tree, "w")[0].fill(2.0)):
        assert made["w"].sharding == sharding


# ---- no second copy ------------------------------------------------------------------------------------------

EDITS = {
    "multiply": (lambda p: pm.at(p, "**").multiply(0.5), lambda p: jax.tree.map(lambda x: x * 0.5, p)),
    "add to one": (lambda p: pm.at(p, "a").add(1.0), lambda p: {**p, "a": p["a"] + 1.0}),
    "zero a row": (lambda p: pm.at(p, "**")[0].zero(), lambda p: jax.tree.map(lambda x: x.at[0].set(0), p)),
    "clip": (lambda p: pm.at(p, "**").clip(-1, 1), lambda p: jax.tree.map(lambda x: jnp.clip(x, -1, 1), p)),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_is_given_its_buffers_works_in_them(name, device):
    ours, by_hand = EDITS[name]
    params = {key: on(device, jnp.ones((256, 256))) for key in "abc"}
    nbytes = sum(x.nbytes for x in params.values())
    step = jax.jit(ours, donate_argnums=0)
    used, other = (f.lower(params).compile().memory_analysis() for f in (step, jax.jit(by_hand, donate_argnums=0)))
    assert used.alias_size_in_bytes == nbytes
    assert used.temp_size_in_bytes <= other.temp_size_in_bytes < 4096
    assert used.output_size_in_bytes == other.output_size_in_bytes < nbytes + 4096
    pointers = sorted(x.unsafe_buffer_pointer() for x in params.values())
    made = step(params)
    assert sorted(x.unsafe_buffer_pointer() for x in made.values()) == pointers
    assert all(x.is_deleted() for x in params.values())


# ---- optimizers ----------------------------------------------------------------------------------------------


def test_a_frozen_leaf_has_no_moments_on_the_device(device):
    params = {"body": {"w": on(device, np.ones((256, 256), "float32"))}, "head": {"w": on(device)}}
    gradients = jax.tree.map(jnp.ones_like, params)

    def held(tx):
        state = tx.init(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(gradients, state, params)
        arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
        assert all(x.devices() == {device} for x in [*jax.tree.leaves(updates), *(x for x in arrays if x.ndim)])
        return sum(x.nbytes for x in arrays)

    masked = optax.multi_transform(
        {"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, {"body": {"w": "freeze"}, "head": {"w": "train"}}
    )
    moments = 2 * params["head"]["w"].nbytes
    assert moments <= held(masked) < moments + 64
    assert moments <= held(pm.freeze(optax.adam(1e-3), "body/**")) < moments + 64
    assert held(optax.adam(1e-3)) > 2 * params["body"]["w"].nbytes


# ---- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "bool"])
def test_values_go_to_a_file_and_come_back_onto_the_device(dtype, device, tmp_path):
    tree = {"w": on(device, jnp.asarray(VALUES * 8).astype(dtype))}
    pm.save(tree, tmp_path / "m.safetensors")
    blank = {"w": jax.ShapeDtypeStruct((4, 8), dtype, sharding=SingleDeviceSharding(device))}
    with pm.open(tmp_path / "m.safetensors") as source:
        for target in (blank, pm.at(tree, "w").zero()):
            made, _ = pm.graft(target, source)
            assert made["w"].devices() == {device} and not pm.diff(made, source)
