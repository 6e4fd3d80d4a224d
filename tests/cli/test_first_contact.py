"""What a newcomer meets first: the examples of every command, `paramend` alone, explanations, completion."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import paramend as pm
from paramend.cli.completion import paths_from
from paramend.cli.examples import EXAMPLES
from paramend.cli.explain import explanations
from paramend.cli.main import ROWS, cli, edits
from paramend.errors import MissingExtra, ParamendError
from support.leaks import leaving_nothing

HIDDEN, MLP, VOCABULARY, LAYERS = 8, 16, 16, 4
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def llama(rng, layers=LAYERS):
    def draw(*shape):
        return rng.normal(size=shape).astype("float32")

    leaves = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}"
        leaves |= {f"{at}.self_attn.{name}_proj.weight": draw(HIDDEN, HIDDEN) for name in "qkvo"}
        leaves |= {f"{at}.mlp.{name}_proj.weight": draw(MLP, HIDDEN) for name in ("gate", "up")}
        leaves |= {f"{at}.mlp.down_proj.weight": draw(HIDDEN, MLP)}
        leaves |= {f"{at}.{name}.weight": draw(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
    return leaves | {"model.norm.weight": draw(HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}


def directory(folder, leaves, config):
    folder.mkdir()
    pm.save(leaves, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with everything that the examples name."""
    folder = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    model = llama(rng)
    directory(folder / "model", model, LLAMA)
    directory(folder / "pretrained", llama(rng), LLAMA)
    directory(folder / "tuned", {path: leaf + 0.01 for path, leaf in model.items()}, LLAMA)
    headless = {path: leaf for path, leaf in model.items() if path != "lm_head.weight"}
    directory(folder / "headless", headless, LLAMA)
    tied = {"tie_word_embeddings": True}
    directory(folder / "tied", headless, LLAMA | tied)
    pm.at(pm.open(folder / "model"), "**/mlp/**").zero().save(folder / "edited", record=True)
    mixed = {path: leaf for path, leaf in model.items() if ".mlp." not in path}
    for i in range(LAYERS):
        at = f"model.layers.{i}.block_sparse_moe"
        mixed |= {f"{at}.gate.weight": np.ones((4, HIDDEN), "float32")}
        shapes = {"w1": (MLP, HIDDEN), "w2": (HIDDEN, MLP), "w3": (MLP, HIDDEN)}
        mixed |= {f"{at}.experts.{e}.{w}.weight": np.ones(s, "float32") for e in range(4) for w, s in shapes.items()}
    experts = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    directory(folder / "mixture", mixed, LLAMA | experts | {"num_experts_per_tok": 2})
    quantised = {"q.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), "q.weight_scale_inv": np.ones((1, 1), "float32")}
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    directory(folder / "quantised", quantised, fp8)
    low = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight": np.ones(shape, "float32")
           for i in range(LAYERS) for x, shape in (("A", (2, HIDDEN)), ("B", (HIDDEN, 2)))}  # fmt: skip
    (folder / "adapter").mkdir()
    pm.save(low, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    pm.save({"weight": np.ones((3, 4), "float32"), "bias": np.ones(3, "float32")}, folder / "linear.safetensors")
    dense = {"kernel": np.ones((4, 3), "float32"), "bias": np.ones(3, "float32")}
    pm.save(dense, folder / "dense.msgpack")
    pm.save({"layers": {"w": np.ones((3, 4), "float32")}}, folder / "scanned.msgpack")
    layer = {"gate": np.ones((2, 4), "float32"), "up": np.ones((2, 4), "float32"), "qkv": np.ones((6, 4), "float32")}
    pm.save(layer, folder / "layer.safetensors")
    np.save(folder / "value.npy", np.ones(HIDDEN, "float32"))
    np.save(folder / "direction.npy", np.eye(HIDDEN, dtype="float32")[0])
    (folder / "recipe.yaml").write_text("version: 1\nsteps:\n  - zero: '**/mlp/**'\n")
    (folder / "score.py").write_text("def score(tree):\n    return float(tree['kernel'].sum())\n")
    (folder / "answer.py").write_text("def solve(seed, x, features, replacement_value):\n    return x\n")
    return folder


SHOWN = {row.name: row for row in (*ROWS, *edits())}
# Commands that fail on purpose: what the answer lacks is what a learner wants to see.
STATUS = {"paramend lesson kernel_replace --grade answer.py": 1}
# They have tests of their own, which take longer than an example may.
ELSEWHERE = {"demo"}


def examples_of(name):
    with cli.make_context("paramend", ["help"]) as top:
        text = cli.get_command(top, name).epilog
    assert text.startswith(("\b\nExample:\n", "\b\nExamples:\n"))
    return [line.strip() for line in text.split("\n")[2:]]


def test_every_command_has_an_example():
    assert not EXAMPLES.keys() - SHOWN.keys()
    for name in SHOWN:
        assert all(line.startswith(f"paramend {name}") for line in examples_of(name)), name


@pytest.mark.parametrize("name", sorted(SHOWN.keys() - ELSEWHERE))
def test_examples_do_what_they_say(name, desk, monkeypatch, tmp_path):
    """Each example runs in a copy of the folder, of which nothing stays open, mapped, locked or half written; jax and
    torch are there in the environment of the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SHELL", "/bin/bash")
    subprocess.run(["cp", "-r", f"{desk}/.", tmp_path], check=True)
    if name == "undo" or name == "history":
        pm.patch("model", lambda model: pm.at(model, "**/mlp/**").zero())
    with leaving_nothing(tmp_path, monkeypatch):
        for line in examples_of(name):
            words = shlex.split(line)[1:]
            if "-o" in words:  # what an example makes may be what another starts from
                subprocess.run(["rm", "-rf", words[words.index("-o") + 1]], check=True)
            done = CliRunner().invoke(cli, words)
            assert done.exit_code == STATUS.get(line, 0), (line, done.output, done.exception)
            if "-o" in words:
                assert Path(words[words.index("-o") + 1]).exists()


def test_alone_it_says_what_to_try(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, [])
    assert done.exit_code == 0 and "paramend show model.safetensors " in done.output
    pm.save({"bias": np.ones(2)}, tmp_path / "my net.safetensors")
    said = CliRunner().invoke(cli, []).output
    rows = [line.strip() for line in said.split("\n") if "my net" in line]
    commands = [re.sub(r"  +(the|an) .*", "", row) for row in rows]
    assert len(commands) == 3
    for command in commands:
        assert CliRunner().invoke(cli, shlex.split(command)[1:]).exit_code == 0, command


def subclasses(kind):
    return {kind, *(found for each in kind.__subclasses__() for found in subclasses(each))}


def test_every_error_has_an_explanation():
    codes = {kind.code for kind in subclasses(ParamendError)} - {"paramend"}
    assert explanations().keys() == codes


@pytest.mark.parametrize("code", sorted(explanations()))
def test_explanations_raise_what_they_explain(code):
    for block in re.findall(r"```python\n(.*?)```", explanations()[code], re.DOTALL):
        with pytest.raises(ParamendError) as caught:
            exec(block, {})
        assert caught.value.code == code
    shown = CliRunner().invoke(cli, ["explain", f"error[{code}]:"])
    words = re.sub(r"```\w*", "", explanations()[code]).split()
    assert shown.exit_code == 0 and shown.output.split()[1:] == words  # code is indented, not fenced
    assert f"\n{code} " in "\n" + CliRunner().invoke(cli, ["explain"]).output


def test_only_what_depends_on_others_has_no_code():
    assert [code for code in explanations() if "```python" not in explanations()[code]] == ["busy", "missing-extra"]
    assert MissingExtra("x").code == "missing-extra"


def test_errors_name_their_code(tmp_path):
    done = CliRunner().invoke(cli, ["show", str(tmp_path / "none.safetensors")])
    assert done.exit_code == 2 and done.stderr.startswith("error[cannot-read]: ")
    wrong = CliRunner().invoke(cli, ["explain", "no-mach"])
    assert wrong.exit_code == 2 and "Did you mean 'no-match'?" in wrong.stderr


def completed(line, cwd):
    words = shlex.split(line) + [""] * line.endswith(" ")
    said = {"_PARAMEND_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-m", "paramend"]
    done = subprocess.run(command, env={**os.environ, **said}, cwd=cwd, capture_output=True, text=True, check=True)
    return [each.removeprefix("plain,") for each in done.stdout.split()]


@pytest.mark.slow
def test_completion(desk):
    assert completed("paramend quan", desk) == ["quantize"]
    assert completed("paramend zero model model.n", desk) == ["model.norm.weight"]
    assert completed("paramend zero model model.layers.", desk) == [f"model.layers.{i}." for i in range(LAYERS)]
    assert completed("paramend zero no-such-file mod", desk) == []


def test_a_path_that_was_begun_goes_on():
    names = ["a.b.c", "a.b.d", "e/f"]
    assert paths_from(names, "a") == ["a.b.c", "a.b.d"] and paths_from(names, "x") == []
    assert paths_from(["w"], "w") == ["w"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_installs_with_one_command(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    printed = CliRunner().invoke(cli, ["completion"])
    done = CliRunner().invoke(cli, ["completion", "--install"])
    assert printed.exit_code == done.exit_code == 0
    path = re.search(r"wrote (\S+);", done.stderr)[1]
    assert Path(path).read_text().strip() == printed.output.strip() and "_PARAMEND_COMPLETE" in printed.output
    if shell == "bash":
        subprocess.run(["bash", "-c", f". {path}; complete -p paramend"], check=True, capture_output=True)


def test_completion_of_an_unknown_shell(monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    done = CliRunner().invoke(cli, ["completion"])
    assert done.exit_code == 2 and "tcsh" in done.stderr and "fish" in done.stderr
