"""Models of transformers as GGUF and back: transformers reads what is written."""

import json

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import paramend as pm
from paramend.cli.main import cli
from support.gguf_files import read

TEXTS = ["<|end|>", "<|begin|>"]


def run(*args, code=0):
    done = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert done.exit_code == code, done.output
    return done.output


def written(folder, kind="llama", dtype=torch.float32, **more):
    """A small model in a folder, and as a module."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        bos_token_id=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        **({"rope_theta": 5000.0, "head_dim": 8, "pad_token_id": None} | more),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config).eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim < 2), std=0.2)
    module.to(dtype).save_pretrained(folder)
    return module.float()


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("mistral", True), ("qwen2", True), ("qwen3", False)])
def test_transformers_reads_the_same_model_there_and_back(tmp_path, kind, tied):
    module = written(tmp_path / kind, kind, torch.bfloat16, tie_word_embeddings=tied)
    run("convert", tmp_path / kind, tmp_path / "m.gguf")
    tensors, keys = read(tmp_path / "m.gguf")
    assert all(each.name == ("F32" if data.ndim < 2 else "BF16") for each, data in tensors.values())
    assert (keys["general.architecture"], keys["general.name"]) == ("llama" if kind == "mistral" else kind, kind)
    architecture = keys["general.architecture"]
    assert keys[f"{architecture}.attention.head_count_kv"] == 2 and keys[f"{architecture}.context_length"] == 64
    assert ("output.weight" in tensors) != tied
    run("convert", tmp_path / "m.gguf", f"{tmp_path}/back/")
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "back")).float()
    found = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=other)
    other.load_state_dict(found["tensors"], strict=False)
    other.tie_weights()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    for state in (other.state_dict(), again.state_dict()):
        assert all(torch.equal(state[name], right) for name, right in module.state_dict().items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == 5000 and config["tie_word_embeddings"] == tied


def test_the_tokens_go_along(tmp_path):
    written(tmp_path / "m")
    vocab = {token: number for number, token in enumerate([*TEXTS, "a", "b", "c", "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(TEXTS)
    tokenizer.add_tokens(["own"])
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    options = {
        "bos_token": "<|begin|>",
        "eos_token": {"content": "<|end|>"},
        "add_bos_token": True,
        "chat_template": "hi",
    }
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(options))
    run("convert", tmp_path / "m", tmp_path / "m.gguf")
    keys = read(tmp_path / "m.gguf")[1]
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.merges"] == ["a b", "ab c"] and len(keys["tokenizer.ggml.tokens"]) == 40
    assert keys["tokenizer.ggml.tokens"][:9] == [*vocab, "own", "[PAD8]"]
    assert keys["tokenizer.ggml.token_type"][:9] == [3, 3, 1, 1, 1, 1, 1, 4, 5]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 0)
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.chat_template"] == "hi"


def test_tokens_of_sentencepiece_have_scores_by_the_order_of_merges(tmp_path):
    written(tmp_path / "m")
    tokens = ["<unk>", "<s>", "</s>", "<0x00>", "▁", "a", "b", "▁a", "▁ab"]
    vocab = {token: number for number, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    run("convert", tmp_path / "m", tmp_path / "m.gguf")
    keys = read(tmp_path / "m.gguf")[1]
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.token_type"][:9] == [2, 3, 3, 6, 1, 1, 1, 1, 1]
    scores = keys["tokenizer.ggml.scores"]
    assert scores[7] == 0 and scores[8] == -1 and max(scores[4:7]) < -1000
    types = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert types["tokenizer.ggml.scores"].types[1].name == "FLOAT32"


def test_what_is_not_known_is_refused(tmp_path):
    written(tmp_path / "m", tie_word_embeddings=True)
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "phi"}))
    assert "how llama.cpp stores models of phi is not known here" in run(
        "convert", tmp_path / "m", tmp_path / "o.gguf", code=2
    )
    scaled = config | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}}
    file.write_text(json.dumps(scaled))
    assert "positions scaled by llama3" in run("convert", tmp_path / "m", tmp_path / "o.gguf", code=2)
    file.unlink()  # weights alone, under the names that they have
    run("convert", tmp_path / "m", tmp_path / "o.gguf")
    assert "model.norm.weight" in read(tmp_path / "o.gguf")[0]


def test_codes_become_floats_before_they_leave_gguf(tmp_path):
    written(tmp_path / "m")
    run("convert", tmp_path / "m", tmp_path / "m.gguf")
    run("quantize", tmp_path / "m.gguf", "blk.*.attn_q.weight", "--scheme", "q8_0", "-o", tmp_path / "q.gguf")
    out = run("convert", tmp_path / "q.gguf", f"{tmp_path}/o/", code=2)
    assert "blk.0.attn_q.weight is in q8_0, which GGUF alone holds" in out
    run("dequantize", tmp_path / "q.gguf", "--dtype", "float16", "-o", tmp_path / "f.gguf")
    run("convert", tmp_path / "f.gguf", f"{tmp_path}/o/")
    found = pm.load(tmp_path / "o", nested=False)["model.layers.0.self_attn.q_proj.weight"]
    assert np.allclose(
        found, pm.load(tmp_path / "m", nested=False)["model.layers.0.self_attn.q_proj.weight"], atol=0.02
    )
