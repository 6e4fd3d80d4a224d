"""Proofs: right ports agree in float64, wrong ones do not, and the first layer that differs is named."""

import functools
import json

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import paramend as pm
from paramend.errors import BadArgument
from paramend.porting.proof import prove
from paramend.porting.trial import perturbed

pytestmark = pytest.mark.numeric
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 8)).astype("float32")
IMAGE = RNG.normal(size=(2, 3, 6, 5)).astype("float32")
BOTH_WAYS = {"target": np.moveaxis(IMAGE, 1, -1), "source": IMAGE}


def numpy(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def dense(state, name):
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


# ---- a transformer block: torch → linen --------------------------------------------------------------------------


class Block(nn.Module):
    epsilon: float = 1e-5
    approximate: bool = False

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention", dropout_rate=0.1)(x)
        x = nn.LayerNorm(name="norm", epsilon=self.epsilon)(x)
        return nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x), approximate=self.approximate))


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.ln = torch.nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), torch.nn.LayerNorm(8)
        self.fc1, self.act, self.fc2 = torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)

    def forward(self, x):
        x = self.ln(x + self.mixer(x, x, x)[0])
        return self.fc2(self.act(self.fc1(x)))


BLOCK = perturbed(TorchBlock())
STATE = numpy(BLOCK)


def block_variables(order="qkv", heads=(8, 2, 4)):
    weights = dict(zip("qkv", np.split(STATE["mixer.in_proj_weight"], 3), strict=True))
    biases = dict(zip("qkv", np.split(STATE["mixer.in_proj_bias"], 3), strict=True))
    attention = {
        name: {"kernel": weights[each].T.reshape(heads), "bias": biases[each].reshape(heads[1:])}
        for name, each in zip(("query", "key", "value"), order, strict=True)
    }
    out = {"kernel": STATE["mixer.out_proj.weight"].T.reshape(2, 4, 8), "bias": STATE["mixer.out_proj.bias"]}
    norm = {"scale": STATE["ln.weight"], "bias": STATE["ln.bias"]}
    up, down = dense(STATE, "fc1"), dense(STATE, "fc2")
    return {"params": {"attention": {**attention, "out": out}, "norm": norm, "up": up, "down": down}}


PAIRS = [("attention", "mixer"), ("norm", "ln"), ("up", "fc1"), ("down", "fc2")]


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_a_right_port_agrees(pairs):
    proof = prove(Block().bind(block_variables()), BLOCK, (X,), pairs=pairs)
    assert proof and proof.first is None and proof.outputs[0].relative <= 1e-11
    assert set(PAIRS) <= {(row.target, row.source) for row in proof.layers}
    assert all(row.agrees for row in proof.layers)


# what is wrong: the target, the first layer that differs on both sides, whether its inputs agree
TRANSPOSED = block_variables()
TRANSPOSED["params"]["attention"]["out"]["kernel"] = STATE["mixer.out_proj.weight"].reshape(2, 4, 8)
WRONG = {
    "epsilon": (Block(epsilon=1e-6).bind(block_variables()), "norm", "ln", True),
    "q and k": (Block().bind(block_variables("kqv")), "attention", "mixer", True),
    "a square kernel": (Block().bind(TRANSPOSED), "attention", "mixer", True),
    "gelu": (Block(approximate=True).bind(block_variables()), "down", "fc2", False),
}


@pytest.mark.parametrize("pairs", [None, PAIRS])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_port_is_caught_and_the_layer_named(name, pairs):
    target, ours, theirs, inputs = WRONG[name]
    proof = prove(target, BLOCK, (X,), pairs=pairs)
    assert not proof
    assert (proof.first.target, proof.first.source, proof.first.inputs) == (ours, theirs, inputs)
    assert proof.outputs[0].relative > 1e-8 and f"{ours} (" in str(proof) and f"{theirs} (" in str(proof)
    assert ("act: GELU" in str(proof)) == (name == "gelu")


# ---- images: channels first and last, statistics, flips ----------------------------------------------------------


class Cnn(nn.Module):
    train: bool = False
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=[(1, 1)] * 2, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=self.momentum, epsilon=1e-5, name="norm")(x)
        return nn.ConvTranspose(2, (2, 2), (2, 2), "SAME", name="up")(x)


CNN = perturbed(
    torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ConvTranspose2d(4, 2, 2, 2)
    )
)
IMAGE_STATE = numpy(CNN)


def cnn_variables(flip=True):
    state = IMAGE_STATE
    up = state["2.weight"][:, :, ::-1, ::-1] if flip else state["2.weight"]
    params = {
        "conv": {"kernel": state["0.weight"].transpose(2, 3, 1, 0), "bias": state["0.bias"]},
        "norm": {"scale": state["1.weight"], "bias": state["1.bias"]},
        "up": {"kernel": up.transpose(2, 3, 0, 1), "bias": state["2.bias"]},
    }
    return {
        "params": params,
        "batch_stats": {"norm": {"mean": state["1.running_mean"], "var": state["1.running_var"]}},
    }


@pytest.mark.parametrize("train", [False, True])
def test_images_agree_with_channels_at_either_end(train):
    CNN.train(train)
    target = Cnn(train=train, momentum=0.5).bind(cnn_variables(), mutable=["batch_stats"])  # momentum is of no effect
    proof = prove(target, CNN, BOTH_WAYS)
    assert proof and [row.target for row in proof.layers[:3]] == ["conv", "norm", "up"]
    assert not prove(lambda x: target(np.moveaxis(x, 1, -1)), CNN, IMAGE)  # no inputs say that axes change places


@pytest.mark.parametrize(("name", "first"), [("flip", "up"), ("mode", "norm")])
def test_what_is_wrong_with_images_is_caught(name, first):
    CNN.train(name == "mode")
    proof = prove(Cnn().bind(cnn_variables(flip=name != "flip")), CNN, BOTH_WAYS)
    assert not proof and proof.first.target == first


# ---- recurrent layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("summed", [True, False])
def test_a_recurrent_bias_that_was_summed_wrongly_is_caught(summed):
    source = perturbed(torch.nn.GRU(8, 4, batch_first=True))
    state = numpy(source)
    kernels = {side: np.split(state[f"weight_{side}_l0"], 3) for side in ("ih", "hh")}
    biases = {side: np.split(state[f"bias_{side}_l0"], 3) for side in ("ih", "hh")}
    cell = {f"i{gate}": {"kernel": kernels["ih"][n].T, "bias": biases["ih"][n]} for n, gate in enumerate("rzn")}
    cell |= {f"h{gate}": {"kernel": kernels["hh"][n].T} for n, gate in enumerate("rzn")}
    for n, gate in enumerate("rz"):
        cell[f"i{gate}"]["bias"] = biases["ih"][n] + biases["hh"][n]
    cell["hn"]["bias"] = biases["hh"][2]
    if not summed:
        cell["hn"]["bias"], cell["in"]["bias"] = np.zeros(4, "float32"), biases["ih"][2] + biases["hh"][2]
    target = nn.Sequential([nn.RNN(nn.GRUCell(4))]).bind({"params": {"layers_0": {"cell": cell}}})
    proof = prove(target, torch.nn.Sequential(source), X)
    assert (bool(proof), proof.alone) == (summed, 1)  # torch returns the last state too
    assert summed or (proof.first.target, proof.first.source) == ("layers_0", "0")


# ---- every framework, functions, outputs ---------------------------------------------------------------------------

LINEAR = perturbed(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)))
WEIGHTS = [dense(numpy(LINEAR), name) for name in "02"]


class Nnx(nnx.Module):
    def __init__(self, weights):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0), dtype=jnp.float16) for _ in weights])
        for layer, new in zip(self.layers, weights, strict=True):
            layer.kernel[...], layer.bias[...] = jnp.array(new["kernel"]), jnp.array(new["bias"])

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x)))


class Equinox(eqx.Module):
    layers: list

    def __init__(self, weights):
        layer = eqx.nn.Linear(8, 8, key=jax.random.key(0))
        new = [(jnp.array(each["kernel"].T), jnp.array(each["bias"])) for each in weights]
        self.layers = [eqx.tree_at(lambda each: (each.weight, each.bias), layer, each) for each in new]

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x)))


def haiku(weights):
    def forward(x):
        first, last = hk.Linear(8, name="a"), hk.Linear(8, name="b")
        return last(jax.nn.relu(first(x)))

    params = {name: {"w": each["kernel"], "b": each["bias"]} for name, each in zip("ab", weights, strict=True)}
    return functools.partial(hk.transform(forward).apply, params, None)


FRAMEWORKS = {"nnx": (Nnx, "layers/1"), "equinox": (Equinox, "layers/1"), "haiku": (haiku, "b")}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_each_framework_is_proven(name):
    make, last = FRAMEWORKS[name]
    rows = X[0, :4]
    assert prove(make(WEIGHTS), LINEAR, torch.tensor(rows))
    wrong = [WEIGHTS[0], {**WEIGHTS[1], "kernel": WEIGHTS[1]["kernel"].T}]  # a square kernel, transposed
    proof = prove(make(wrong), LINEAR, (rows,))
    assert not proof and (proof.first.target, proof.first.source, proof.first.inputs) == (last, "2", True)


def test_functions_are_run_as_they_are_and_name_the_layers_that_they_call():
    wrong = perturbed(LINEAR, 1)
    with torch.no_grad():
        wrong[0].load_state_dict(LINEAR[0].state_dict())
    assert prove(lambda x: LINEAR(x) * 2, lambda x: 2 * LINEAR(x), X)
    proof = prove(lambda x: wrong(x), LINEAR, X)
    assert (proof.first.target, proof.first.source) == ("2", "2")
    assert prove(lambda x: np.tanh(x), torch.nn.Tanh(), X)


class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.q(x) @ self.k(x).mT


def test_layers_of_one_shape_that_changed_places_are_compared_in_their_order():
    source = perturbed(Scores())
    target = perturbed(Scores())
    target.q, target.k = source.k, source.q
    proof = prove(target, source, X)
    assert not proof and (proof.first.target, proof.first.source) == ("q", "q")


@pytest.mark.parametrize("flipped", [False, True])
def test_attention_of_nnx_is_computed_in_float64(flipped):
    source = perturbed(torch.nn.MultiheadAttention(8, 2, batch_first=True))
    state = numpy(source)
    target = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)
    for name, at in (("query", 0), ("key", 1), ("value", 2)):
        weight, bias = (np.split(state[f"in_proj_{each}"], 3)[at] for each in ("weight", "bias"))
        heads = weight.T.reshape(8, 4, 2).swapaxes(1, 2) if flipped else weight.T.reshape(8, 2, 4)
        getattr(target, name).kernel.set_value(jnp.array(heads))
        getattr(target, name).bias.set_value(jnp.array(bias.reshape(2, 4)))
    target.out.kernel.set_value(jnp.array(state["out_proj.weight"].T.reshape(2, 4, 8)))
    target.out.bias.set_value(jnp.array(state["out_proj.bias"]))
    proof = prove(target, source, {"target": (X,), "source": (X, X, X)})
    assert bool(proof) is not flipped and proof.layers[-1].kinds == ("MultiHeadAttention", "MultiheadAttention")


def test_the_end_of_a_model_can_differ_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model[0]

        def forward(self, x):
            return self.layer(x) * 2

    proof = prove(Scaled(), model, X)
    assert not proof and "after layer (Linear) ◄─ 0 (Linear)" in str(proof)


def test_outputs_are_compared_by_name_or_in_order():
    one, other = (lambda x: {"b": x, "a": x + 1}), (lambda x: {"a": x + 1, "b": x, "past": x})
    proof = prove(one, other, X)
    assert proof and proof.alone == 1 and "1 without counterpart" in proof.headline()
    assert prove(lambda x: (x, x + 1), lambda x: [x, x + 1], X)
    assert not prove(lambda x: (x, x + 1), lambda x: (x + 1, x), X)
    assert prove(lambda x: x, lambda x: x[None], X) and not prove(lambda x: x.T, lambda x: x, X[0])


@pytest.mark.parametrize("function", [lambda x: None, lambda x: x * np.nan, lambda x: x[:0]])
def test_nothing_is_proven_by_nothing(function):
    proof = prove(function, function, X)
    assert not proof and proof.headline().startswith("nothing is proven")


def test_a_difference_of_shapes_is_told():
    proof = prove(lambda x: x[:1], lambda x: x, X)
    assert not proof and "(1, 5, 8) in the target, (2, 5, 8) in the source" in str(proof)
    assert json.loads(json.dumps(proof.to_dict(), allow_nan=False))["outputs"][0]["difference"] is None


def test_a_value_that_is_zero_but_for_rounding_agrees_with_zero():
    """A row of equal values, normalised: what is left is a share of them as small as rounding."""
    even = np.full((2, 7), 0.1)
    normalised = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(1e-5)
    assert prove(normalised, lambda x: x * 0, even)


def test_the_report_is_text_data_and_a_page(tmp_path):
    proof = prove(*(WRONG["epsilon"][0], BLOCK), (X,))
    data = json.loads(json.dumps(proof.to_dict(), allow_nan=False))
    assert (data["agrees"], data["first"]["target"], data["first"]["source"]) == (False, "norm", "ln")
    assert data["first"]["shapes"] == [[2, 5, 8], [2, 5, 8]]
    assert "</html>" in proof.to_html(tmp_path / "proof.html")
    assert "its inputs agree" in repr(proof)


def test_wrong_arguments_are_refused_and_a_failure_says_whose_it_is():
    with pytest.raises(BadArgument, match="inputs are named target") as caught:
        prove(LINEAR, LINEAR, {"target": X})
    assert "source" in caught.value.hint
    with pytest.raises(BadArgument, match="tolerance=-1"):
        prove(LINEAR, LINEAR, X, tolerance=-1)
    with pytest.raises(RuntimeError) as failed:
        prove(LINEAR, torch.nn.Linear(3, 3), X)
    assert failed.value.__notes__ == ["raised by the source of a proof"]


# ---- perturbed -----------------------------------------------------------------------------------------------------


def test_all_parameters_are_perturbed_in_a_copy():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8).half())
    model[0].register_buffer("table", torch.ones(3), persistent=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = perturbed(model, 3)
    for name, value in new.state_dict().items():
        assert torch.equal(model.state_dict()[name], before[name]) and value.dtype == before[name].dtype
        assert (value != before[name]).all() or name == "1.num_batches_tracked"
    assert (new[1].running_var > 0).all() and torch.equal(new[0].table, torch.ones(3))
    assert torch.equal(perturbed(model, 3)[0].weight, new[0].weight)


def test_perturbed_keeps_ties_and_kinds():
    layer = torch.nn.Linear(4, 4)
    new = perturbed(torch.nn.Sequential(layer, layer))
    assert new[0].weight is new[1].weight and isinstance(new[0].weight, torch.nn.Parameter)
    bound = perturbed(Cnn().bind(cnn_variables()))
    assert (bound.variables["batch_stats"]["norm"]["var"] > 0).all()
    assert bound.variables["params"]["conv"]["kernel"].dtype == jnp.float32
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    assert isinstance(perturbed(dropout), nnx.Dropout) and type(perturbed(Equinox(WEIGHTS))) is Equinox
    assert (perturbed({"running_var": np.zeros(9), "n": np.arange(3)})["running_var"] > 0).all()
    with pytest.raises(BadArgument, match="holds no parameters"):
        perturbed(len)


def test_prove_is_public():
    assert pm.prove is prove
