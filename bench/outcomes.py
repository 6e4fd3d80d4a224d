"""The inputs of the tasks of bench/tasks, and whether an outcome is right: numpy and safetensors, never Paramend.

    python bench/outcomes.py make FOLDER           inputs in safetensors
    python bench/outcomes.py foreign FOLDER        those of torch and llama.cpp, by their own libraries
    python bench/outcomes.py safetensors OUT.pt    a file of torch as one of safetensors, for `check`
    python bench/outcomes.py check TASK FOLDER OUTCOME

`check` prints an object of JSON: whether the edit is right, whether all other leaves have their bits, whether the
metadata of the file were kept, whether config.json is true (null where a task or a format has none), and what there is
to say.
"""

import json
import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, FEED, VOCAB, LAYERS, HEADS = 768, 2048, 8192, 8, 12
WIDER, DEEPER = 8448, 12  # the model that is grafted into
EXPERTS, KEPT = 8, [0, 2, 5, 7]
RANK, ALPHA = 8, 16
BLOCK = 128
DTYPES = {"F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
METADATA = {"format": "pt", "run": "7"}
NAME = "A much longer name"
BFLOAT16, FLOAT8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SILENT = r"\.(o_proj|down_proj)\.weight$"

# ---- inputs ----------------------------------------------------------------------------------------------------------


def llama(rng, layers=LAYERS, vocab=VOCAB, mlp=None):
    shapes = {
        "model.embed_tokens.weight": (vocab, HIDDEN),
        "lm_head.weight": (vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    mlp = mlp or {"mlp.gate_proj": (FEED, HIDDEN), "mlp.up_proj": (FEED, HIDDEN), "mlp.down_proj": (HIDDEN, FEED)}
    attention = {f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (HIDDEN,))
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{part}.weight": shape for part, shape in (attention | mlp | norms).items()}
    return {name: (0.05 * rng.standard_normal(shape, "f4")).astype(BFLOAT16) for name, shape in shapes.items()}


def write(folder, leaves, **config):
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file(leaves, folder / "model.safetensors", METADATA)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": FEED,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
    }
    known = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
    }
    other = {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(known | sizes | other | config, indent=2))


def make(folder):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    model = llama(rng)
    write(folder / "model", model)
    tuned = dict(model)
    for n in range(LAYERS):
        name = f"model.layers.{n}.self_attn.q_proj.weight"
        change = rng.standard_normal((HIDDEN, 4), "f4") @ rng.standard_normal((4, HIDDEN), "f4")
        tuned[name] = (model[name].astype("f4") + 0.05 * change).astype(BFLOAT16)
    write(folder / "tuned", tuned)
    write(folder / "bigger", llama(rng, DEEPER, WIDER), num_hidden_layers=DEEPER, vocab_size=WIDER)

    terms = {}
    for n in range(LAYERS):
        for part in "qv":
            place = f"base_model.model.model.layers.{n}.self_attn.{part}_proj"
            terms[f"{place}.lora_A.weight"] = rng.standard_normal((RANK, HIDDEN), "f4") / 50
            terms[f"{place}.lora_B.weight"] = rng.standard_normal((HIDDEN, RANK), "f4") / 50
    (folder / "adapter").mkdir()
    save_file(terms, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    coded = {}
    for name, leaf in model.items():
        coded |= encoded(name, leaf) if "_proj" in name else {name: leaf}
    scheme = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    write(folder / "fp8", coded, quantization_config=scheme)

    parts = {"gate_proj": (FEED, HIDDEN), "up_proj": (FEED, HIDDEN), "down_proj": (HIDDEN, FEED)}
    mlp = {f"mlp.experts.{n}.{part}": shape for n in range(EXPERTS) for part, shape in parts.items()}
    head = {f"self_attn.{part}_norm": (HIDDEN // HEADS,) for part in "qk"}
    shapes = {"mlp.gate": (EXPERTS, HIDDEN)} | mlp | head
    moe = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "mlp_only_layers": [],
    }
    counts = {
        "num_experts_per_tok": 2,
        "moe_intermediate_size": FEED,
        "head_dim": HIDDEN // HEADS,
        "decoder_sparse_step": 1,
    }
    write(folder / "moe", llama(rng, 2, mlp=shapes), num_hidden_layers=2, **moe, **counts)


def encoded(name, leaf):
    rows, columns = (length // BLOCK for length in leaf.shape)
    blocks = leaf.astype("f4").reshape(rows, BLOCK, columns, BLOCK)
    scales = np.abs(blocks).max((1, 3)) / np.float32(448)
    codes = (blocks / scales[:, None, :, None]).astype(FLOAT8).reshape(leaf.shape)
    return {name: codes, f"{name}_scale_inv": scales}


def decoded(leaves, name):
    codes, scales = leaves[name].astype("f4"), leaves[f"{name}_scale_inv"].astype("f4")
    return codes * np.repeat(np.repeat(scales, BLOCK, 0), BLOCK, 1)


def foreign(folder):
    import gguf
    import torch
    from safetensors.torch import load_file

    for name in ("model", "tuned"):
        torch.save(load_file(folder / name / "model.safetensors"), folder / f"{name}.pt")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name("short")
    writer.add_block_count(4)
    rng = np.random.default_rng(0)
    for n in range(4):
        values = rng.standard_normal((2048, 4096), "f4")
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"blk.{n}.ffn_up.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- what is right ---------------------------------------------------------------------------------------------------


def moved(old, order):
    """Leaves of layers in another order."""
    new = {name: leaf for name, leaf in old.items() if ".layers." not in name}
    for place, source in enumerate(order):
        start = f"model.layers.{source}."
        new |= {f"model.layers.{place}.{n.removeprefix(start)}": leaf for n, leaf in old.items() if n.startswith(start)}
    return new


def zero(old, inputs):
    name = f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"
    return {name: np.zeros_like(old[name])}


def scale(old, inputs):
    return {name: (leaf.astype("f4") / 2).astype(BFLOAT16) for name, leaf in old.items()}


def rename(old, inputs):
    gone = {name: None for name in old if name.startswith("model.")}
    return gone | {re.sub(r"^model\.", "decoder.", name): old[name] for name in gone}


def drop(old, inputs):
    return replaced(old, moved(old, [0, 1, 2, 5, 6, 7]))


def deepen(old, inputs):
    new = moved(old, [0, 1, 2, 3, 3, 4, 5, 6, 7, 7])
    silent = {
        name: np.zeros_like(leaf) for name, leaf in new.items() if re.search(rf"\.layers\.[49]\..*{SILENT}", name)
    }
    return replaced(old, new | silent)


def replaced(old, new):
    """What makes all leaves the new ones."""
    return {name: None for name in old if name not in new} | {n: leaf for n, leaf in new.items() if ".layers." in n}


def cast(old, inputs):
    return {name: leaf.astype("f2") for name, leaf in old.items()}


def merge(old, inputs):
    tuned = read(inputs / "tuned")
    return {name: ((leaf.astype("f8") + tuned[name].astype("f8")) / 2).astype(BFLOAT16) for name, leaf in old.items()}


def fold(old, inputs):
    terms, new = read(inputs / "adapter"), {}
    for name, up in terms.items():
        if ".lora_B" in name:
            down, place = (
                terms[name.replace("lora_B", "lora_A")],
                name[len("base_model.model.") :].replace(".lora_B", ""),
            )
            change = ALPHA / RANK * up.astype("f8") @ down.astype("f8")
            new[place] = (old[place].astype("f8") + change).astype(BFLOAT16)
    return new


def graft(old, inputs):
    new = dict(old)
    for name, leaf in read(inputs / "model").items():
        new[name] = new[name].copy()
        new[name][tuple(map(slice, leaf.shape))] = leaf
    return new


def experts(old, inputs):
    new = {}
    for name, leaf in old.items():
        found = re.match(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if found:
            new[name] = old[f"{found[1]}.{KEPT[int(found[2])]}.{found[3]}"] if int(found[2]) < len(KEPT) else None
        elif name.endswith(".mlp.gate.weight"):
            new[name] = leaf[KEPT]
    return new


def in_place(old, inputs):
    return {"lm_head.weight": np.zeros_like(old["lm_head.weight"])}


# Task: where its leaves come from, what they become (None: they go), the share of a number by which rounding may be
# off, and what config.json says then.
TASKS = {
    "zero": ("model", zero, 0, {}),
    "scale": ("model", scale, 0, {}),
    "rename": ("model", rename, 0, None),
    "drop": ("model", drop, 0, {"num_hidden_layers": 6}),
    "deepen": ("model", deepen, 0, {"num_hidden_layers": 10}),
    "cast": ("model", cast, 0, {"torch_dtype": "float16"}),
    "merge": ("model", merge, 2**-8, {}),
    "fold": ("model", fold, 2**-7, {}),
    "graft": ("bigger", graft, 0, {"num_hidden_layers": DEEPER, "vocab_size": WIDER}),
    "in_place": ("large.safetensors", in_place, 0, None),
    "experts": ("moe", experts, 0, {"num_experts": len(KEPT)}),
}
CHANGING = ("drop", "deepen", "cast", "experts")  # where config.json must not stay what it is


def files_of(where):
    return [where] if where.is_file() else sorted(where.glob("*.safetensors"))


def header_of(file):
    """What safetensors stores in front of the leaves, and where these begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length


def read(where):
    """name → leaf; the reader of safetensors for numpy knows no FP8."""
    found = {}
    for file in files_of(where):
        header, start = header_of(file)
        for name, row in header.items():
            if name != "__metadata__":
                begin, end = row["data_offsets"]
                dtype = np.dtype(DTYPES[row["dtype"]])
                words = np.fromfile(file, dtype, (end - begin) // dtype.itemsize, offset=start + begin)
                found[name] = words.reshape(row["shape"])
    return found


def metadata_of(where):
    return header_of(files_of(where)[0])[0].get("__metadata__", {})


def bits(leaf):
    return leaf.dtype, leaf.shape, leaf.tobytes()


def compared(old, new, found, loss):
    """Whether the edited leaves are right and the others have their bits, and what there is to say."""
    kept, says = {name: leaf for name, leaf in old.items() if name not in new}, []
    edited = {name: leaf for name, leaf in new.items() if leaf is not None}
    lost, more = (kept | edited).keys() - found.keys(), found.keys() - (kept | edited).keys()
    says += [f"{len(names)} leaves {what}" for names, what in ((lost, "are lost"), (more, "too many")) if names]
    wrong, rounded, negative = [], [], False
    for name in edited.keys() & found.keys():
        one, other = edited[name], found[name]
        if one.dtype != other.dtype or one.shape != other.shape:
            wrong.append(name)
        elif bits(one) != bits(other):
            a, b = one.astype("f8"), other.astype("f8")
            if np.all(np.abs(a - b) <= loss * np.maximum(np.abs(a), np.abs(old.get(name, one).astype("f8")))):
                rounded += [np.mean(a != b)] if loss else []
                negative |= loss == 0
            else:
                wrong.append(name)
    says += [f"{len(wrong)} edited leaves are wrong"] if wrong else []
    # What float32 cannot hold of a sum is a number in ten thousand or less; more of them were rounded twice.
    says += [f"{max(rounded):.1%} of the numbers of a leaf are rounded twice"] if max(rounded, default=0) > 1e-3 else []
    says += ["some zeros are -0.0"] if negative else []
    apart = [name for name in kept.keys() & found.keys() if bits(kept[name]) != bits(found[name])]
    says += [f"{len(apart)} other leaves differ"] if apart else []
    right = (
        not wrong and not edited.keys() & lost and not any(name in found for name, leaf in new.items() if leaf is None)
    )
    return {"edit": right, "others": not apart and not kept.keys() & lost and not more, "says": says}


def config_is_true(task, where, wanted):
    file = where / "config.json"
    if wanted is None or not (where.is_dir() or task in CHANGING):
        return None  # a bare file, and a configuration that stays what it is
    if not file.exists():
        return False
    config = json.loads(file.read_text())
    for new, known in (("dtype", "torch_dtype"), ("num_local_experts", "num_experts")):  # as transformers 5 writes them
        config[known] = config.get(new, config.get(known))
    return all(config.get(key) == value for key, value in wanted.items())


def check(task, inputs, outcome):
    if task in OTHERWISE:
        return OTHERWISE[task](inputs, outcome)
    source, edit, loss, wanted = TASKS[task]
    torch_file = outcome.with_suffix("").name.endswith("-pt")
    old, found = read(inputs / source), read(outcome)
    told = compared(old, edit(old, inputs), found, loss)
    told["metadata"] = None if torch_file else metadata_of(outcome).items() >= METADATA.items()
    if source.endswith(".safetensors"):
        told["metadata"] = metadata_of(outcome) == metadata_of(inputs / source)
    told["config"] = config_is_true(task, outcome, None if torch_file and task not in CHANGING else wanted)
    return told


def check_extracted(inputs, outcome):
    """The terms hold of each difference what its best approximation of that rank holds, and there are no others."""
    old, tuned, terms, says = read(inputs / "model"), read(inputs / "tuned"), read(outcome), []
    config, worst = json.loads((outcome / "adapter_config.json").read_text()), 0.0
    changed = {name for name in old if bits(old[name]) != bits(tuned[name])}
    for name in changed:
        down, up = (find(terms, name.removesuffix(".weight"), part) for part in ("lora_A", "lora_B"))
        if up is None or down is None:
            return {"edit": False, "others": True, "metadata": None, "config": None, "says": ["terms are missing"]}
        change = tuned[name].astype("f8") - old[name].astype("f8")
        best = np.sqrt((np.linalg.svd(change, compute_uv=False)[RANK:] ** 2).sum())
        held = config["lora_alpha"] / config["r"] * up.astype("f8") @ down.astype("f8")
        worst = max(worst, np.linalg.norm(change - held) / best)
    others = sum(".lora_B" in name for name in terms) == len(changed) == sum(".lora_A" in name for name in terms)
    says += [f"up to {worst:.2f} times the error of the best of that rank"] if worst > 1.01 else []
    return {"edit": bool(worst < 1.05), "others": others, "metadata": None, "config": True, "says": says}


def find(terms, place, part):
    return next((leaf for name, leaf in terms.items() if f"{place}.{part}" in name), None)


def check_fp8(inputs, outcome):
    old, found, says = read(inputs / "fp8"), read(outcome), []
    name = "model.layers.0.self_attn.q_proj.weight"
    pair = {name, f"{name}_scale_inv"}
    apart = [
        n
        for n in old.keys() | found.keys()
        if n not in pair and (n not in old or n not in found or bits(old[n]) != bits(found[n]))
    ]
    weight = decoded(old, name)
    wanted = weight.copy()
    wanted[:64] *= 2
    with np.errstate(all="ignore"):
        now = decoded(found, name)
        off = np.linalg.norm(now - wanted) / np.linalg.norm(wanted)
    right = bool(
        found[name].dtype == old[name].dtype and off <= 2**-5
    )  # the rounding of e4m3 is 2^-4 of a number at most
    says += (
        []
        if right
        else [f"{int((~np.isfinite(now)).sum())} NaN" if not np.isfinite(now).all() else f"off by {off:.0%}"]
    )
    rows = np.array_equal(now[BLOCK:], weight[BLOCK:])
    kept = metadata_of(outcome).items() >= METADATA.items()
    told = {"edit": right, "others": not apart and rows, "metadata": kept, "says": says}
    return told | {"config": config_is_true("fp8", outcome, {"vocab_size": VOCAB})}


def check_gguf(inputs, outcome):
    import gguf

    old, new = (gguf.GGUFReader(file) for file in (inputs / "model.gguf", outcome))

    def keys(reader):
        hidden = ("GGUF.", "general.name")
        return {name: field.contents() for name, field in reader.fields.items() if not name.startswith(hidden)}

    def leaves(reader):
        return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in reader.tensors}

    right = new.fields["general.name"].contents() == NAME
    return {
        "edit": right,
        "others": leaves(old) == leaves(new),
        "metadata": keys(old) == keys(new),
        "config": None,
        "says": [],
    }


OTHERWISE = {"extract": check_extracted, "fp8": check_fp8, "gguf": check_gguf}


def main(what, *args):
    paths = [Path(arg) for arg in args]
    if what == "make":
        make(*paths)
    elif what == "foreign":
        foreign(*paths)
    elif what == "safetensors":
        import torch
        from safetensors.torch import save_file

        tensors = torch.load(paths[0], weights_only=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, paths[0].with_name("out-pt.safetensors")
        )
    else:
        print(json.dumps(check(args[0], *paths[1:])))


if __name__ == "__main__":
    main(*sys.argv[1:])
