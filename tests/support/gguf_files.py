"""Small files as `gguf.GGUFWriter` writes them."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type, quants

# Shapes are small, and rows as long as blocks are.
LAYER = {
    "attn_norm": Type.F32,
    "attn_q": Type.Q8_0,
    "attn_k": Type.Q4_0,
    "attn_v": Type.F16,
    "attn_output": Type.BF16,
    "ffn_gate": Type.Q5_1,
    "ffn_up": Type.Q4_K,
    "ffn_down": Type.Q6_K,
}
SCALES = {Type.Q4_K: (0, 2), Type.Q6_K: (208,), Type.Q2_K: (80, 82), Type.Q3_K: (108,)}


def stored(rng, shape, kind):
    """A tensor as it is stored: numbers, or bytes of blocks."""
    values = rng.standard_normal(shape).astype(np.float32)
    if kind not in SCALES:
        return quants.quantize(values, kind) if kind != Type.F32 else values
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, nbytes), dtype=np.uint8)
    for at in SCALES[kind]:
        raw[..., at : at + 2] = rng.uniform(0.001, 0.01, raw.shape[:-1]).astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def model(path, *, layers=2, experts=0, keys=None, kinds=LAYER, tensors=None, **options):
    """A model of a few layers; with experts, their weights in place of the MLP's."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    rng = np.random.default_rng(0)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length([512] * layers)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 1, 2, 1, 2, 1][:layers])
    writer.add_rope_freq_base(1e-5)
    writer.add_token_list([f"t{n}" for n in range(8)])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for key, value, kind in keys or ():
        writer.add_key_value(key, value, kind)
    writer.add_tensor("token_embd.weight", rng.standard_normal((8, 256)).astype(np.float32))
    for n in range(layers):
        for name, kind in kinds.items():
            shape = (256,) if "norm" in name else (4, 512) if name == "ffn_down" else (4, 256)
            if experts and name.startswith("ffn"):
                name, shape = f"{name}_exps", (experts, *shape)
            writer.add_tensor(f"blk.{n}.{name}.weight", stored(rng, shape, kind), raw_dtype=kind)
        if experts:
            writer.add_tensor(f"blk.{n}.ffn_gate_inp.weight", rng.standard_normal((experts, 256)).astype(np.float32))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    write(writer)
    return path


def write(writer):
    """Write what a writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path):
    """Name → (type, bytes as they are stored) and key → value, by `gguf.GGUFReader`."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: (tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors}
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return tensors, keys


def values(kind, data):
    """The values of a tensor, by the package that defines them."""
    return (
        data
        if data.dtype.kind == "f" or (kind.name.startswith("I") and kind.name[1:].isdigit())
        else quants.dequantize(data, kind)
    )
