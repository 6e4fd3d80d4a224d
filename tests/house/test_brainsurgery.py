"""The five usability tasks of BrainSurgery on a small GPT-2: outcomes by arithmetic."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from click.testing import CliRunner

from paramend.cli.main import cli

TOP = Path(__file__).parents[2]
OURS = TOP / "bench" / "brainsurgery"
LAYERS, HEADS, HEAD, WIDTH = 12, 12, 64, 8  # heads as the recipe has them, and a narrow residual stream
BLOCK = {
    "attn.bias": (1, 1, 4, 4),  # the mask, which the hub's file holds
    "attn.c_attn.bias": (3 * HEADS * HEAD,),
    "attn.c_attn.weight": (WIDTH, 3 * HEADS * HEAD),
    "attn.c_proj.weight": (HEADS * HEAD, WIDTH),
    "ln_1.weight": (WIDTH,),
    "mlp.c_fc.bias": (4,),
    "mlp.c_fc.weight": (WIDTH, 4),
}


def integers(rng, shape):
    """Small ones, which are exact in bfloat16 and in every order of a sum."""
    return rng.integers(-64, 64, shape).astype("float32")


def write(folder, leaves, **config):
    folder.mkdir()
    safetensors.numpy.save_file(leaves, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return leaves


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The leaves of the model in `inputs/base`; the folder above is the working directory."""
    monkeypatch.chdir(tmp_path)
    for file in OURS.iterdir():
        shutil.copy(file, tmp_path)
    Path("inputs").mkdir()
    rng = np.random.default_rng(0)
    leaves = {f"h.{n}.{name}": integers(rng, shape) for n in range(LAYERS) for name, shape in BLOCK.items()}
    leaves["wte.weight"] = integers(rng, (6, WIDTH))
    return write(Path("inputs/base"), leaves, model_type="gpt2", n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)


def outcome(task):
    """The leaves that the commands of a task leave in `out`."""
    for line in Path(f"{task}.sh").read_text().splitlines():
        _, *args = shlex.split(line)
        done = CliRunner().invoke(cli, args, prog_name="paramend")
        assert done.exit_code == 0, f"{line}\n{done.output}"
    found = {}
    for file in Path("out").glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert found[name].dtype == leaf.dtype and np.array_equal(found[name], leaf), name


def test_blocks_go_and_the_others_are_numbered_anew(base):
    wanted = {"wte.weight": base["wte.weight"]}
    for new, old in enumerate([0, 1, 3, 4, 6, 7, 9, 10, 11]):
        wanted |= {f"h.{new}.{name}": base[f"h.{old}.{name}"] for name in BLOCK}
    same(outcome("T1"), wanted)
    assert json.loads(Path("out/config.json").read_text())["n_layer"] == 9


def test_one_head_goes_from_every_layer(base):
    places = np.arange(HEADS * HEAD)
    head = places[places // HEAD != 5]
    three = np.concatenate([head + start for start in (0, HEADS * HEAD, 2 * HEADS * HEAD)])
    wanted = dict(base)
    for n in range(LAYERS):
        wanted[f"h.{n}.attn.c_attn.weight"] = base[f"h.{n}.attn.c_attn.weight"][:, three]
        wanted[f"h.{n}.attn.c_attn.bias"] = base[f"h.{n}.attn.c_attn.bias"][three]
        wanted[f"h.{n}.attn.c_proj.weight"] = base[f"h.{n}.attn.c_proj.weight"][head]
    same(outcome("T2"), wanted)


def test_projections_become_bfloat16_and_the_masks_go(base):
    found = outcome("T3")
    assert found.keys() == {name for name in base if not name.endswith(".attn.bias")}
    assert Path("out/model.safetensors.index.json").exists() or len(list(Path("out").glob("*.safetensors"))) == 1
    for name, leaf in found.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            assert leaf.dtype.name == "bfloat16" and np.array_equal(leaf.astype("float32"), base[name])
        else:
            assert leaf.dtype == np.float32 and np.array_equal(leaf, base[name])


def tuned(base, *, only):
    rng, names = np.random.default_rng(1), [name for name in base if only in name]
    for folder in ("ft1", "ft2"):
        leaves = {name: leaf + integers(rng, leaf.shape) if name in names else leaf for name, leaf in base.items()}
        yield write(Path("inputs", folder), leaves, model_type="gpt2")


def test_two_task_vectors_are_added_where_all_else_agrees(base):
    one, two = tuned(base, only=".mlp.")
    found = outcome("T4")
    for name, leaf in base.items():
        exact = leaf.astype("f8") + 0.4 * (one[name] - leaf).astype("f8") + 0.4 * (two[name] - leaf).astype("f8")
        if ".mlp." in name:
            np.testing.assert_allclose(found[name], exact, rtol=1e-6, atol=1e-5)
        else:
            assert found[name].tobytes() == leaf.tobytes()


def test_a_tune_that_moved_something_else_is_not_merged(base):
    list(tuned(base, only=".ln_1."))
    with pytest.raises(AssertionError, match="--only"):
        outcome("T4")
    assert not Path("out").exists()


def test_an_adapter_is_folded_into_the_fused_projection(base):
    rng, terms, wanted = np.random.default_rng(2), {}, dict(base)
    for n in range(LAYERS):
        down, up = integers(rng, (16, WIDTH)), integers(rng, (3 * HEADS * HEAD, 16))
        where = f"base_model.model.transformer.h.{n}.attn.c_attn"
        terms |= {f"{where}.lora_A.weight": down, f"{where}.lora_B.weight": up}
        wanted[f"h.{n}.attn.c_attn.weight"] = base[f"h.{n}.attn.c_attn.weight"] + 2 * (up @ down).T
    Path("inputs/lora").mkdir()
    safetensors.numpy.save_file(terms, "inputs/lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "fan_in_fan_out": True}
    Path("inputs/lora/adapter_config.json").write_text(json.dumps(config))
    same(outcome("T5"), wanted)
