"""`deepen` on checkpoints: what transformers loads is what deepening the loaded model gives, and nothing is read."""

import json

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, BadCheckpoint, NoMatch, Unsupported
from support.tiny_models import FAMILIES, loaded, logits, make

ORDER = pm.depth.blocks(3, count=2)


def bits(path):
    return {name: (x.dtype.name, x.shape, x.tobytes()) for name, x in pm.load(path, nested=False).items()}


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_of_every_family(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    with pm.open(tmp_path / "model") as checkpoint:
        deeper, report = pm.deepen(checkpoint, order=ORDER)
        deeper.save(tmp_path / "out")
    in_memory, told = pm.deepen(model, order=ORDER)
    in_memory.save_pretrained(tmp_path / "expected")
    assert bits(tmp_path / "out") == bits(tmp_path / "expected")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "expected")]
    assert configs[0] == configs[1]
    assert report.config == told.config
    with torch.no_grad():
        assert torch.equal(logits(loaded(family, tmp_path / "out"), family), logits(model, family))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name: safetensors.numpy.load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert {(name, file) for file, held in files.items() for name in held} == set(index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(x.nbytes for held in files.values() for x in held.values())


@pytest.fixture
def folder(tmp_path):
    """A model of three layers with all that stands beside weights."""
    rng = np.random.default_rng(0)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    tree = {
        f"model.layers.{i}.{n}.weight": rng.normal(size=4).astype(ml_dtypes.bfloat16) for i in range(3) for n in names
    }
    tree["lm_head.weight"] = rng.normal(size=(2, 4)).astype("float32")
    path = tmp_path / "model"
    path.mkdir()
    safetensors.numpy.save_file(tree, path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "num_hidden_layers": 3, "rms_norm_eps": 1e-05, "name": "é"}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_bytes(b"{}\n\x00")
    return path, tree


@pytest.mark.parametrize("order", [[0, 1, 2, 0, 1, 2], [0, 1, 1, 2], [2, 0], [1]], ids=str)
def test_other_orders(folder, tmp_path, order):
    path, tree = folder
    with pm.open(path) as checkpoint:
        deeper, report = pm.deepen(checkpoint, order=order)
        written = deeper.save(tmp_path / "out")
    expected = {"lm_head.weight": tree["lm_head.weight"]}
    for target, source in enumerate(order):
        above = f"model.layers.{source}."
        expected |= {f"model.layers.{target}.{n[len(above) :]}": x for n, x in tree.items() if n.startswith(above)}
    assert bits(tmp_path / "out") == {n: (x.dtype.name, x.shape, x.tobytes()) for n, x in expected.items()}
    assert written.bytes_computed == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}\n\x00"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((path / "config.json").read_text()) | {"num_hidden_layers": len(order)}
    assert list(config) == ["model_type", "num_hidden_layers", "rms_norm_eps", "name"]
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert report.config == ([f"num_hidden_layers: 3 -> {len(order)}"] if len(order) != 3 else report.config)


def test_edits_before_and_after(folder, tmp_path):
    path, tree = folder
    with pm.open(path) as checkpoint:
        doubled = pm.at(checkpoint, "**/layers[0]/**").multiply(2)
        deeper, _ = pm.deepen(doubled, order=[0, 0, 1, 2])
        again, _ = pm.deepen(pm.at(deeper, "**/layers[1]/mlp/**").zero(), order=[1, 1, 0])
        again.save(tmp_path / "out")
    out = pm.load(tmp_path / "out", nested=False)
    gate, norm = "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.input_layernorm.weight"
    assert not out[gate.format(0)].any()
    assert not out[gate.format(1)].any()
    assert (out[gate.format(2)] == tree[gate.format(0)] * 2).all()
    assert (out[norm.format(1)] == tree[norm.format(0)] * 2).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3


def test_one_file_says_that_the_configuration_stays(folder, tmp_path):
    path, _ = folder
    with pm.open(path / "model.safetensors") as checkpoint:
        deeper, report = pm.deepen(checkpoint, order=ORDER)
        deeper.save(tmp_path / "out.safetensors")
    assert len(pm.load(tmp_path / "out.safetensors", nested=False)) == 5 * 9 + 1
    assert "is not changed" in report.config[0]
    assert "config: " in str(report)


def test_tied_tensors_of_torch_files(tmp_path):
    embed = torch.ones(2, 2)
    state = {"wte.weight": embed} | {f"h.{i}.mlp.weight": torch.full((2,), float(i)) for i in range(2)}
    torch.save(state | {"head.weight": embed, "h.0.tied": embed}, tmp_path / "model.pt")
    with pm.open(tmp_path / "model.pt") as checkpoint:
        deeper, _ = pm.deepen(checkpoint, layers="h[*]", order=[0, 0, 1])
        names = [deeper.index.path(number) for number in deeper.ties]
        assert names == ["wte.weight", "h.0.tied", "h.1.tied", "head.weight"]
        deeper.save(tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(out[name], embed) for name in names)
    assert out["h.2.mlp.weight"].tolist() == [1, 1]


def test_parameters_of_flax_in_msgpack(tmp_path):
    params = {"params": {f"Dense_{i}": {"kernel": np.full((2, 2), i, "float32")} for i in range(4)}}
    (tmp_path / "p.msgpack").write_bytes(flax.serialization.to_bytes(params))
    options = {"layers": "params/Dense_[1:-1]", "order": pm.depth.blocks(2, count=1), "identity": "kernel"}
    with pm.open(tmp_path / "p.msgpack") as checkpoint:
        deeper, report = pm.deepen(checkpoint, **options)
        deeper.save(tmp_path / "o.msgpack")
    expected, told = pm.deepen(params, **options)
    out = flax.serialization.msgpack_restore((tmp_path / "o.msgpack").read_bytes())
    assert list(out["params"]) == list(expected["params"])
    assert all((out["params"][name]["kernel"] == layer["kernel"]).all() for name, layer in expected["params"].items())
    assert report.to_dict() == told.to_dict()
    assert report.to_html().startswith("<!doctype html>")


def test_refusals_write_nothing(folder, tmp_path):
    path, _ = folder
    with pm.open(path) as checkpoint:
        with pytest.raises(Unsupported, match="in memory"):
            pm.deepen(checkpoint, layers=pm.sel("**")[:], order=[0])
        with pytest.raises(Unsupported, match="cannot be changed in place"):
            pm.deepen_(checkpoint, order=[0])
        with pytest.raises(NoMatch, match="names no numbered layers"):
            pm.deepen(checkpoint, layers="h[*]", order=[0])
    for text, error in (
        ("{", BadCheckpoint),
        ("[]", BadCheckpoint),
        ('{"num_hidden_layers":3,"scale_depth":1}', Unsupported),
    ):
        (path / "config.json").write_text(text)
        with pm.open(path) as checkpoint, pytest.raises(error):
            pm.deepen(checkpoint, order=ORDER)
    (path / "config.json").write_text('{"model_type": "gemma2"}')
    with pm.open(path) as checkpoint, pytest.raises(BadArgument, match="post_feedforward_layernorm is missing"):
        pm.deepen(checkpoint, order=ORDER)


# ---- the command -----------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(cli, ["deepen", *map(str, args)])


@pytest.mark.parametrize(
    ("options", "order"),
    [
        (["--blocks", "2"], "0 1 1* 2 2*"),
        (["--stack", "2"], "0 1 2 0 1 2"),
        (["--interleave", "2"], "0 0 1 1 2 2"),
        (["--overlap", "1"], "0 1 1 2"),
        (["--drop", "0,-1"], "1"),
        (["--order", "0,1,1,2"], "0 1 1 2"),
        (["--blocks", "1", "--identity", "llama", "--layers", "model.layers[*]"], "0 1 2 2*"),
        (["--blocks", "1", "--identity", "self_attn.o_proj.*=0", "--identity", "mlp.down_proj.*=-1"], "0 1 2 2*"),
    ],
    ids=str,
)
def test_the_command(folder, tmp_path, options, order):
    path, _ = folder
    dry = run(path, *options, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "out").exists()
    result = run(path, *options, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    planned = json.loads(dry.stdout)
    assert data["layers"] == planned["layers"]
    marked = [f"{s}{'*' * (t in data['identity'])}" for t, s in enumerate(data["order"])]
    assert " ".join(marked) == order
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(data["order"])
    assert "kept" in run(path, *options, "--dry-run").stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-o", "OUT"], "One of --blocks"),
        (["--blocks", "1", "--stack", "2", "-o", "OUT"], "One of --blocks"),
        (["--blocks", "1"], "-o OUT is needed"),
        (["--blocks", "0", "-o", "OUT"], "--blocks 0"),
        (["--order", "0,x", "-o", "OUT"], "'x' is neither a number nor a range"),
        (["--order", "0,7", "-o", "OUT"], "names layer 7"),
        (["--drop", "9", "-o", "OUT"], "no layer 9"),
        (["--blocks", "1", "--identity", "a=b", "-o", "OUT"], "not SELECTOR=VALUE"),
        (["--blocks", "1", "--layers", "h[*]", "-o", "OUT"], "names no numbered layers"),
        (["--blocks", "1", "-o", "FOLDER"], "exists"),
    ],
    ids=str,
)
def test_what_the_command_refuses(folder, tmp_path, options, says):
    path, _ = folder
    places = {"OUT": tmp_path / "out", "FOLDER": path}
    result = run(path, *(places.get(option, option) for option in options))
    assert result.exit_code == 2
    assert says in result.output or "is what is being read" in result.output
    assert not (tmp_path / "out").exists()


# ---- what the configuration says of single layers ----------------------------------------------------------------


def configured(path, **says):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | says))


def test_kinds_told_by_a_period_are_refused_or_given(folder, tmp_path):
    path, _ = folder
    configured(path, model_type="unheard", full_attention_interval=2)
    with pm.open(path) as checkpoint:
        with pytest.raises(Unsupported, match="full_attention_interval=2") as raised:
            pm.deepen(checkpoint, order=[1, 2])
        assert "config={'full_attention_interval': 2}" in raised.value.hint
        made, report = pm.deepen(checkpoint, order=[1, 2], config={"full_attention_interval": 1, "extra": {"a": 1}})
        made.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["full_attention_interval"], config["extra"]) == (2, 1, {"a": 1})
    assert "full_attention_interval: 1, as given" in report.config
    result = run(path, "--order", "1,2", "-o", tmp_path / "cli", "--set", "full_attention_interval=1")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "cli" / "config.json").read_text())["full_attention_interval"] == 1
    result = run(path, "--order", "1,2", "-o", tmp_path / "no", "--set", "full_attention_interval")
    assert result.exit_code == 2


def test_a_part_of_the_layers_keeps_the_others_in_lists(folder, tmp_path):
    path, _ = folder
    configured(path, layer_types=["a", "b", "c"])
    with pm.open(path) as checkpoint:
        pm.deepen(checkpoint, layers="model.layers[1:]", order=[1, 0, 0])[0].save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (4, ["a", "c", "b", "b"])


def test_a_layer_with_other_leaves_than_its_place_is_refused(folder, tmp_path):
    path, tree = folder
    tree = {name: x for name, x in tree.items() if name != "model.layers.0.input_layernorm.weight"}
    safetensors.numpy.save_file(tree, path / "model.safetensors", {"format": "pt"})
    with pm.open(path) as checkpoint:
        with pytest.raises(Unsupported, match=r"layer 1 .* would become layer 0.*more: input_layernorm.weight"):
            pm.deepen(checkpoint, order=[1, 2])
        assert len(pm.deepen(checkpoint, order=[0, 2])[0]) == 18
        assert len(pm.deepen(checkpoint, order=[1, 2], config={})[0]) == 19
    result = run(path, "--order", "1,2", "-o", tmp_path / "out", "--set", "none")
    assert result.exit_code == 0, result.output


def test_files_beside_that_number_layers_follow(folder, tmp_path):
    path, _ = folder
    (path / "hf_quant_config.json").write_text('{"quantization": {"exclude_modules": ["model.layers.2.mlp"]}}')
    (path / "adapter_config.json").write_text('{"layers_to_transform": [0, 2]}')
    with pm.open(path) as checkpoint:
        made, report = pm.deepen(checkpoint, order=[1, 2])
        made.save(tmp_path / "out")
    new = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert new == {"quantization": {"exclude_modules": ["model.layers.1.mlp"]}}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {"layers_to_transform": [1]}
    assert len(report.config) == 3


def test_the_adapter_of_some_layers(tmp_path):
    """Its numbers are those of the model that it adapts."""
    path = tmp_path / "adapter"
    path.mkdir()
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    tensors = {name.format(i): np.full((2, 2), i, "float32") for i in (4, 5, 6)}
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"layers_to_transform": [4, 5, 6], "rank_pattern": {"layers.6.q": 8}}')
    with pm.open(path) as checkpoint:
        pm.deepen(checkpoint, order=[0, 2, 2])[0].save(tmp_path / "out")
    out = pm.load(tmp_path / "out" / "adapter_model.safetensors", nested=False)
    assert [out[name.format(i)][0, 0] for i in (4, 5, 6)] == [4, 6, 6]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {"layers_to_transform": [4, 5, 6], "rank_pattern": {"layers.5.q": 8, "layers.6.q": 8}}


def test_a_given_value_without_a_configuration_is_refused(tmp_path):
    pm.save({f"h.{i}.w": np.ones(2) for i in range(2)}, tmp_path / "w.safetensors")
    with pm.open(tmp_path / "w.safetensors") as checkpoint, pytest.raises(BadArgument, match="no configuration"):
        pm.deepen(checkpoint, order=[0], config={"a": 1})


def test_the_first_block_of_t5_alone_keeps_its_bias(tmp_path):
    path = tmp_path / "t5"
    path.mkdir()
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors = {f"encoder.block.{i}.layer.1.wo.weight": np.full(2, i, "float32") for i in range(3)}
    safetensors.numpy.save_file(tensors | {bias: np.ones(2, "float32")}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true, "num_layers": 3}')
    with pm.open(path) as checkpoint:
        with pytest.raises(Unsupported, match="must stay first"):
            pm.deepen(checkpoint, layers="encoder.block[*]", order=[1, 2])
        made, _ = pm.deepen(checkpoint, layers="encoder.block[*]", order=pm.depth.stack(3))
        assert [name for name in made.index.texts.values() if "bias" in name] == [bias]
        assert len(made) == 7


def test_lists_beside_the_layers_are_told(tmp_path):
    path = tmp_path / "xlm"
    path.mkdir()
    tensors = {
        f"transformer.{name}.{i}.weight": np.ones(2, "float32") for i in range(3) for name in ("attentions", "ffns")
    }
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "xlm", "n_layers": 3}')
    with pm.open(path) as checkpoint:
        report = pm.deepen(checkpoint, layers="transformer.attentions[*]", order=[0, 1])[1]
        assert report.config[0] == "n_layers: 3 -> 2"
        assert report.config[1].startswith("transformer.ffns keeps its 3 entries")
        assert len(pm.deepen(checkpoint, layers="transformer.*.<n>", order=[0, 1])[1].config) == 1
