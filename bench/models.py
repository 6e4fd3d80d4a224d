"""Synthetic models on disk: Llama-shaped, bfloat16, written in bounded memory by the standard library alone.

`make(...)` works in a process of its own: the kernel counts the memory of a process that starts another one as the
other's, so what starts measured processes must stay small.
"""

import json
import multiprocessing
import os
import random
from pathlib import Path

HIDDEN, FEED, VOCAB = 3072, 8192, 16384  # lm_head and the embedding take 100 MB each
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED, HIDDEN),
    "mlp.up_proj": (FEED, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def count(shape):
    product = 1
    for length in shape:
        product *= length
    return product


PER_LAYER = 2 * sum(map(count, LAYER.values()))
OUTER = 2 * (2 * VOCAB * HIDDEN + HIDDEN)


def layers_of(nbytes):
    """How many layers make a model of about so many bytes."""
    return max(round((nbytes - OUTER) / PER_LAYER), 1)


def llama(layers):
    """name → shape, in the order of the file."""
    table = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for n in range(layers):
        table |= {f"model.layers.{n}.{part}.weight": shape for part, shape in LAYER.items()}
    return table | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def mixture(layers=61, experts=384, hidden=7168, feed=2048):
    """name → shape of a mixture of experts with 1.04 trillion parameters in 71,000 tensors."""
    parts = {"gate_proj": (feed, hidden), "up_proj": (feed, hidden), "down_proj": (hidden, feed)}
    table = {"model.embed_tokens.weight": (163840, hidden)}
    for n in range(layers):
        table[f"model.layers.{n}.self_attn.o_proj.weight"] = (hidden, 8192)
        for expert in range(experts):
            table |= {f"model.layers.{n}.mlp.experts.{expert}.{p}.weight": shape for p, shape in parts.items()}
    return table | {"lm_head.weight": (163840, hidden)}


def header(shapes):
    table, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * count(shape)]}
        at = table[name]["data_offsets"][1]
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, at


def write_file(path, shapes, *, sparse=False):
    """One safetensors file; a sparse one takes no disk."""
    head, nbytes = header(shapes)
    with path.open("wb") as file:
        file.write(head)
        if sparse:
            file.truncate(len(head) + nbytes)
            return
        # Normal-sized bfloat16 numbers of both signs: no NaN, and no subnormals, which are slow to multiply.
        block = bytearray(random.Random(0).randbytes(1 << 22))
        block[1::2] = block[1::2].translate(bytes(0x3C + n % 4 + (n & 0x80) for n in range(256)))
        left = nbytes
        while left:
            left -= file.write(memoryview(block)[: min(left, len(block))])
        file.flush()
        os.fsync(file.fileno())


def write_shards(folder, shapes, shards, *, sparse=False):
    """A directory of shards of about the same size with its index."""
    folder = Path(folder)
    folder.mkdir()
    total = 2 * sum(map(count, shapes.values()))
    parts, at = [{} for _ in range(shards)], 0
    for name, shape in shapes.items():
        parts[min(at * shards // total, shards - 1)][name] = shape
        at += 2 * count(shape)
    weight_map = {}
    for n, part in enumerate(parts, 1):
        name = f"model-{n:05}-of-{shards:05}.safetensors"
        write_file(folder / name, part, sparse=sparse)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_config(folder, layers):
    """What transformers and mergekit ask for beside the weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED,
        "num_hidden_layers": layers,
        "num_attention_heads": 24,
        "num_key_value_heads": 24,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (Path(folder) / "config.json").write_text(json.dumps(config))


def make(function, *args, **options):
    """Calls a function of this file in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args, kwargs=options)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def make_one(folder, layers):
    """A folder with one file, as transformers and mergekit take it."""
    folder.mkdir()
    write_file(folder / "model.safetensors", llama(layers))
    write_config(folder, layers)


def make_shards(folder, layers, shards, *, sparse=False):
    """A folder of shards; without layers, the mixture of a trillion parameters."""
    write_shards(folder, mixture() if layers is None else llama(layers), shards, sparse=sparse)


def make_head(path, nbytes):
    """A file of what a model may lack, about so many bytes."""
    write_file(path, {f"mtp.{name}": shape for name, shape in llama(layers_of(nbytes)).items()})


def make_experts(path, nbytes):
    """A file of a mixture of experts; of 4 GB it holds 18,432 of their tensors."""
    write_file(path, mixture(max(round(48 * nbytes / 4e9), 1), 128, 384, 288))


def make_square(path, nbytes):
    """A file with one square tensor of about so many bytes."""
    side = int((nbytes / 2) ** 0.5)
    write_file(path, {"w": (side, side)})


def make_large(path):
    """A sparse file with a tensor of 2 GB."""
    write_file(path, {"large.weight": (1 << 15, 1 << 15), "small.weight": (8, 8)}, sparse=True)
