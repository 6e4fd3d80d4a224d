"""Directories: names that readers look for, weights in other forms, and what the configuration says of the outcome."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli

TENSORS = {f"layers.{i}.experts.{e}.w": np.full((2, 2), i, "float32") for i in range(3) for e in range(4)}
TENSORS |= {"head.weight": np.ones((2, 4), "float32")}


@pytest.fixture
def folder(tmp_path):
    def make(name="model.safetensors", config=None, beside=()):
        home = tmp_path / "model"
        home.mkdir()
        if name.endswith(".bin"):
            torch.save({key: torch.from_numpy(value) for key, value in TENSORS.items()}, home / name)
        else:
            safetensors.numpy.save_file(TENSORS, home / name, {"format": "pt"})
        if config is not None:
            (home / "config.json").write_text(json.dumps(config))
        for file in beside:
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            (home / file).write_bytes(b"x")
        return home

    return make


def files(home):
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())


STEMS = {
    "adapter_model.safetensors": "adapter_model",
    "adapter_model.bin": "adapter_model",
    "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model",
    "diffusion_pytorch_model.fp16.safetensors": "diffusion_pytorch_model.fp16",
    "diffusion_pytorch_model.bin": "diffusion_pytorch_model",
    "model.fp16.safetensors": "model.fp16",
    "pytorch_model.bin": "model",
}


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("made", ["deepen", "stack", "graft"])
def test_weights_keep_the_name_that_their_reader_looks_for(folder, tmp_path, name, made):
    home, stem = folder(name), STEMS[name]
    checkpoint = pm.open(home)
    if made == "deepen":
        new = pm.deepen(checkpoint, layers="layers[*]", order=[0, 1])[0]
    elif made == "stack":
        new = pm.stack_layers(checkpoint, "layers[*]")
    else:
        new = pm.graft(checkpoint, {"head.weight": np.zeros((2, 4), "float32")})[0]
    new.save(tmp_path / "whole")
    assert files(tmp_path / "whole") == [name if made == "graft" else f"{stem}.safetensors"]
    new.save(tmp_path / "shards", max_shard_size=100)
    base, dot, variant = stem.partition(".")
    index = f"{base}.safetensors.index{dot}{variant}.json"
    table = json.loads((tmp_path / "shards" / index).read_text())
    assert files(tmp_path / "shards") == sorted({index, *table["weight_map"].values()})
    assert all(shard.startswith(f"{stem}-0000") for shard in table["weight_map"].values())
    assert len(pm.open(tmp_path / "shards")) == len(new)


def test_shards_of_a_variant_are_read_and_written_with_their_index(folder, tmp_path):
    with pm.open(folder("diffusion_pytorch_model.fp16.safetensors")) as checkpoint:
        checkpoint.save(tmp_path / "shards", max_shard_size=100)
    with pm.open(tmp_path / "shards") as checkpoint:
        pm.at(checkpoint, "head.weight").delete().save(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.fp16.json").read_text())
    assert sorted(index["weight_map"]) == sorted(TENSORS.keys() - {"head.weight"})


OTHER = ["onnx/model.onnx", "onnx/model.onnx_data", "original/consolidated.00.pth", "tiny.Q4_K.gguf", "gguf/x.gguf"]
OTHER += ["openvino/openvino_model.bin", "encoder.onnx", "more/deep/a.gguf"]
KEPT = ["original/params.json", "onnx/config.json", "tokenizer.json", "training_args.bin", "optimizer.pt"]


@pytest.mark.parametrize("save", ["again", "deepen"])
def test_weights_in_other_forms_stay_behind_and_are_named(folder, tmp_path, save):
    home = folder(beside=[*OTHER, *KEPT, "2_Dense/model.safetensors", "unet/pytorch_model.bin"])
    checkpoint = pm.open(home)
    new = pm.at(checkpoint, "head.weight").zero()
    new = pm.deepen(new, layers="layers[*]", order=[0])[0] if save == "deepen" else new
    report = new.save(tmp_path / "out")
    assert sorted(report.left_out) == sorted(f"{name} (other weights)" for name in OTHER)
    assert files(tmp_path / "out") == sorted(
        ["model.safetensors", *KEPT, "2_Dense/model.safetensors", "unet/pytorch_model.bin"]
    )
    assert report.said == (
        "copied as they are, with weights of their own: 2_Dense/model.safetensors, unet/pytorch_model.bin",
    )
    assert "2_Dense" in report.summary and report.to_dict()["said"] == list(report.said)


# ---- the configuration -------------------------------------------------------------------------------------------

COUNTS = {"num_hidden_layers": 3, "text_config": {"num_local_experts": 4}}


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        ("layers[-1].**", ["config.json still says num_hidden_layers: 3, and layers has 2"]),
        ("layers[0].**", ["config.json still says num_hidden_layers: 3, and layers has 2, without 0"]),
        ("**.experts[-1].**", ["config.json still says num_local_experts: 4, and 3 layers have 3"]),
        ("layers[1].experts[:2].**", ["config.json still says num_local_experts: 4, and 1 layer has 2"]),
        ("head.**", []),
    ],
)
def test_deleting_by_hand_says_what_is_still_counted(folder, tmp_path, selector, says):
    with pm.open(folder(config=COUNTS)) as checkpoint:
        report = pm.at(checkpoint, selector).delete().save(tmp_path / "out")
    assert list(report.said) == says
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()


def test_layers_moved_beyond_the_count_are_said(folder, tmp_path):
    with pm.open(folder(config=COUNTS)) as checkpoint:
        report = pm.at(checkpoint, "layers.2.**").rename("layers.5.**").save(tmp_path / "out")
        assert report.said == ("config.json still says num_hidden_layers: 3, and layers has 3, without 2, 3, 4",)
        assert pm.at(checkpoint, "layers.<n>.**").rename("h.<n>.**").save(tmp_path / "named").said == ()


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_dtype_follows_a_cast_of_all_weights(folder, tmp_path, key, link):
    config = {key: "float32", "text_config": {key: "float32"}, "quantization_config": {"dtype": "float32"}, "n": 1}
    with pm.open(folder(config=config)) as checkpoint:
        report = pm.at(checkpoint, "**").cast("bfloat16").save(tmp_path / "out", link=link)
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert new == config | {key: "bfloat16", "text_config": {key: "bfloat16"}}
    assert report.said == (
        f"config.json: {key}: float32 -> bfloat16",
        f"config.json: text_config.{key}: float32 -> bfloat16",
    )
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("selector", "dtype", "says"),
    [
        ("head.**", "float16", "1 of 13 leaves became float16"),
        ("**", "float8_e4m3fn", "13 of 13 leaves became float8_e4m3fn"),
    ],
)
def test_a_dtype_that_the_configuration_cannot_say_is_told(folder, tmp_path, selector, dtype, says):
    with pm.open(folder(config={"torch_dtype": "float32"})) as checkpoint:
        report = pm.at(checkpoint, selector).cast(dtype).save(tmp_path / "out")
    assert report.said == (f"config.json still says torch_dtype: float32, and {says}",)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float32"}


def test_a_deepened_and_cast_model_has_both_in_its_configuration(folder, tmp_path):
    with pm.open(folder(config={"num_hidden_layers": 3, "dtype": "float32"})) as checkpoint:
        made, _ = pm.deepen(checkpoint, layers="layers[*]", order=[0, 2])
        report = pm.at(made, "**").cast("float16").save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"num_hidden_layers": 2, "dtype": "float16"}
    assert report.said == ("config.json: dtype: float32 -> float16",)


def test_a_damaged_configuration_is_copied(folder, tmp_path):
    home = folder()
    (home / "config.json").write_text("{")
    with pm.open(home) as checkpoint:
        assert pm.at(checkpoint, "**").cast("float16").save(tmp_path / "out").said == ()
    assert (tmp_path / "out" / "config.json").read_text() == "{"


def test_a_single_file_says_what_its_configuration_should_say(folder, tmp_path):
    home = folder(config={"num_hidden_layers": 3, "dtype": "float32"})
    with pm.open(home / "model.safetensors") as checkpoint:
        report = pm.at(checkpoint, "**").cast("float16").save(tmp_path / "out.safetensors")
        cut = pm.at(checkpoint, "layers[-1].**").delete().save(tmp_path / "cut.safetensors")
        assert pm.at(checkpoint, "head.**").zero().save(tmp_path / "zero.safetensors").said == ()
    assert report.said == (f"{home / 'config.json'} is not changed, and should be: dtype: float32 -> float16",)
    assert cut.said == ("config.json still says num_hidden_layers: 3, and layers has 2",)


def test_a_dry_run_says_it_too(folder, tmp_path):
    home = folder(config=COUNTS)
    for out in ([], ["-o", str(tmp_path / "out")]):
        result = CliRunner().invoke(cli, ["delete", str(home), "layers[-1].**", "--dry-run", "--json", *out])
        assert json.loads(result.stdout)["said"] == ["config.json still says num_hidden_layers: 3, and layers has 2"]
        assert "config.json still says" in result.stderr
