"""Models of transformers, written by it, edited here, and loaded by it again."""

import copy
import json
import os
import shutil
import zipfile

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import safetensors.torch
import torch
import transformers
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from support.tiny_models import settled

transformers.utils.logging.disable_progress_bar()

SMALL = {"vocab_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
pytestmark = [pytest.mark.slow, pytest.mark.numeric]
TOKENS = torch.arange(12).reshape(2, 6)


def llama(**options):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=32, **options)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, **sizes))


def vit():
    sizes = SMALL | {"image_size": 8, "patch_size": 4}
    del sizes["vocab_size"]
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


# name → a model, what is edited in its files, and what in the module: parameters whose names hold this
MODELS = {
    "llama": (llama, "**/layers[-1]/mlp/down_proj/weight", "model.layers.2.mlp.down_proj.weight"),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), "**/embed_tokens/weight", "embed_tokens.weight"),
    "llama, bf16": (
        lambda: llama().to(torch.bfloat16),
        "**/layers[0]/self_attn/q_proj/*",
        "layers.0.self_attn.q_proj.",
    ),
    "gpt2": (gpt2, "**/h[-1]/mlp/c_proj/*", "h.2.mlp.c_proj."),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=32)),
        "**/layer[1]/output/dense/*",
        "layer.1.output.dense.",
    ),
    "vit": (vit, "vit/encoder/layer[-1]/**", "vit.layers.2."),  # the file has other names than the module
}


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    """A model in memory, its directory, what is edited, and the model edited in memory."""
    torch.manual_seed(0)
    make, selector, part = MODELS[request.param]
    return prepare(make(), tmp_path / "model", selector, part)


def prepare(model, folder, selector, part, **options):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.1)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    model = settled(type(model).from_pretrained(folder, dtype="auto"))  # buffers are as every reader gets them
    edited = copy.deepcopy(model)
    names = [name for name, _ in edited.named_parameters() if part in name]
    with torch.no_grad():
        for name in names:
            assert edited.get_parameter(name).any()
            edited.get_parameter(name).zero_()
    assert names and not torch.equal(logits(edited), logits(model))
    return model, folder, selector, edited


def logits(model):
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8).to(model.dtype)).logits
        return model(TOKENS).logits


def loads_as(folder, model, **options):
    """The directory loads, nothing missing and nothing over, and computes what the model does."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, dtype="auto", **options)
    assert not any(info.values()), info
    assert loaded.dtype == model.dtype
    assert torch.equal(logits(settled(loaded)), logits(model))


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def others_are_equal(before, after, names):
    assert before.keys() == after.keys()
    for name in before.keys() - set(names):
        a, b = before[name].contiguous(), after[name].contiguous()
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name


def sidecars(folder):
    weights = (".safetensors", ".index.json", ".bin")
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(weights))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_edit_loads(case, tmp_path):
    model, folder, selector, edited = case
    names = pm.at(pm.open(folder), selector).paths
    pm.at(pm.open(folder), selector).zero().save(tmp_path / "out")
    loads_as(tmp_path / "out", edited)
    others_are_equal(tensors(folder), tensors(tmp_path / "out"), names)
    assert sidecars(tmp_path / "out") == sidecars(folder)
    pm.open(folder).save(tmp_path / "same")
    assert content(tmp_path / "same") == content(folder)
    loads_as(tmp_path / "same", model)


def test_a_patch_loads_and_an_undo_too(case):
    model, folder, selector, edited = case
    before = content(folder)
    pm.patch(folder, lambda t: pm.at(t, selector).zero())
    loads_as(folder, edited)
    pm.undo(folder)
    assert content(folder) == before
    loads_as(folder, model)


def test_to_torch_and_back(case, tmp_path):
    _, folder, selector, edited = case
    pm.at(pm.open(folder), selector).zero().save(tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    found = tensors(folder)
    assert state.keys() == found.keys() and all(state[name].dtype == found[name].dtype for name in found)
    pm.open(tmp_path / "model.pt").save(f"{tmp_path}/back/")
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, tmp_path / "back" / name)
    loads_as(tmp_path / "back", edited)


# ---- shards --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    torch.manual_seed(1)
    model = llama(tie_word_embeddings=True).to(torch.bfloat16)
    found = prepare(model, tmp_path / "model", "**/layers[-1]/mlp/*/weight", "layers.2.mlp.", max_shard_size="6KB")
    assert len(list(found[1].glob("*.safetensors"))) > 2
    return found


def check_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found, total = {}, 0
    for shard in folder.glob("*.safetensors"):
        state = safetensors.torch.load_file(shard)
        found |= dict.fromkeys(state, shard.name)
        total += sum(x.numel() * x.element_size() for x in state.values())
    assert index["weight_map"] == found and index["metadata"]["total_size"] == total


def test_shards_edited_and_linked(sharded, tmp_path):
    _, folder, selector, edited = sharded
    command = ["zero", str(folder), selector, "-o", str(tmp_path / "out"), "--link"]
    done = CliRunner().invoke(cli, command, prog_name="paramend")
    assert done.exit_code == 0, done.output
    loads_as(tmp_path / "out", edited)
    linked = [path.name for path in folder.glob("*.safetensors") if path.samefile(tmp_path / "out" / path.name)]
    assert linked and len(linked) < len(list(folder.glob("*.safetensors")))
    others_are_equal(tensors(folder), tensors(tmp_path / "out"), pm.at(pm.open(folder), selector).paths)
    assert (tmp_path / "out" / "model.safetensors.index.json").read_bytes() == (
        folder / "model.safetensors.index.json"
    ).read_bytes()


@pytest.mark.parametrize("size", ["3KB", "9KB", "1GB"])
def test_shards_of_another_size(sharded, tmp_path, size):
    _, folder, selector, edited = sharded
    report = pm.at(pm.open(folder), selector).zero().save(tmp_path / "out", max_shard_size=size)
    assert (len([name for name in report.files if name.endswith(".safetensors")]) == 1) == (size == "1GB")
    if size != "1GB":
        check_index(tmp_path / "out")
    loads_as(tmp_path / "out", edited)
    assert sidecars(tmp_path / "out") == sidecars(folder)


def test_shards_patched(sharded):
    _, folder, selector, edited = sharded
    before = content(folder)
    pm.patch(folder, lambda t: pm.at(t, selector).zero())
    loads_as(folder, edited)
    pm.undo(folder)
    assert content(folder) == before


@pytest.mark.parametrize("size", ["6KB", "1GB"], ids=["shards", "one file"])
def test_a_part_that_was_taken_out_is_put_back_in_place(tmp_path, size):
    model, folder, selector, _ = prepare(
        llama(), tmp_path / "model", "**/layers[-1]/**", "layers.2.", max_shard_size=size
    )
    pm.at(pm.open(folder), selector).delete().save(tmp_path / "out")
    before = content(tmp_path / "out")
    pm.patch(tmp_path / "out", lambda t: pm.insert(t, pm.open(folder), selector)[0])
    check_index(tmp_path / "out")
    loads_as(tmp_path / "out", model)
    pm.undo(tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_renamed_model_and_back(sharded, tmp_path):
    model, folder, _, _ = sharded
    edited = pm.at(pm.open(folder), "model.layers.<n>.**").rename("blocks.<n>.**")
    edited.save(tmp_path / "renamed")
    check_index(tmp_path / "renamed")
    pm.at(pm.open(tmp_path / "renamed"), "blocks.<n>.**").rename("model.layers.<n>.**").save(tmp_path / "back")
    loads_as(tmp_path / "back", model)
    others_are_equal(tensors(folder), tensors(tmp_path / "back"), [])


def test_another_dtype(sharded, tmp_path):
    model, folder, _, _ = sharded
    pm.at(pm.open(folder), "**").cast("float32").save(tmp_path / "out")
    check_index(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    loads_as(tmp_path / "out", copy.deepcopy(model).to(torch.float32))


# ---- shards of torch -----------------------------------------------------------------------------------------------


@pytest.fixture
def bins(sharded, tmp_path):
    """The model as older versions of transformers wrote it."""
    model, folder, selector, edited = sharded
    old = tmp_path / "old"
    old.mkdir()
    weight_map, shards = {}, sorted(folder.glob("*.safetensors"))
    for n, shard in enumerate(shards, 1):
        name = f"pytorch_model-{n:05}-of-{len(shards):05}.bin"
        state = safetensors.torch.load_file(shard)
        torch.save(state, old / name)
        weight_map |= dict.fromkeys(state, name)
    index = json.loads((folder / "model.safetensors.index.json").read_text()) | {"weight_map": weight_map}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(folder / name, old / name)
    return model, old, selector, edited


def check_zips(folder):
    for path in folder.glob("*.bin"):
        assert zipfile.ZipFile(path).testzip() is None


def test_shards_of_torch_saved(bins, tmp_path):
    model, folder, selector, edited = bins
    loads_as(folder, model, use_safetensors=False)
    pm.at(pm.open(folder), selector).zero().save(tmp_path / "out", link=True)
    check_zips(tmp_path / "out")
    loads_as(tmp_path / "out", edited, use_safetensors=False)
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    pm.at(pm.open(folder), "**").cast("float32").save(tmp_path / "wide")
    check_zips(tmp_path / "wide")
    found = torch.load(next((tmp_path / "wide").glob("*.bin")), weights_only=True)
    assert {leaf.dtype for leaf in found.values()} == {torch.float32}
    size = json.loads((tmp_path / "wide" / "pytorch_model.bin.index.json").read_text())["metadata"]["total_size"]
    assert size == 2 * json.loads((folder / "pytorch_model.bin.index.json").read_text())["metadata"]["total_size"]


def test_shards_of_torch_patched(bins):
    _, folder, selector, edited = bins
    before = content(folder)
    pm.patch(folder, lambda t: pm.at(t, selector).zero())
    check_zips(folder)
    loads_as(folder, edited, use_safetensors=False)
    pm.undo(folder)
    assert content(folder) == before


def test_shards_of_torch_as_safetensors(bins, tmp_path):
    _, folder, selector, edited = bins
    report = pm.at(pm.open(folder), selector).zero().save(tmp_path / "out", max_shard_size="6KB")
    assert report.left_out == ()
    check_index(tmp_path / "out")
    loads_as(tmp_path / "out", edited)
