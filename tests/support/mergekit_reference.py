"""Small models, configurations of mergekit, and what mergekit makes of them.

Run as a script where mergekit is installed it makes `mergekit_reference.npz` anew; tests read that file.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).with_suffix(".npz")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "vocab_size": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SHAPES = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
for layer in range(4):
    SHAPES |= {
        f"model.layers.{layer}.{name}.weight": shape
        for name, shape in {
            "input_layernorm": (4,),
            "post_attention_layernorm": (4,),
            "self_attn.q_proj": (4, 4),
            "self_attn.k_proj": (2, 4),
            "self_attn.v_proj": (2, 4),
            "self_attn.o_proj": (4, 4),
            "mlp.gate_proj": (6, 4),
            "mlp.up_proj": (6, 4),
            "mlp.down_proj": (4, 6),
        }.items()
    }
BASED = """base_model: base
models:
  - {model: a, parameters: {weight: 0.7%s}}
  - {model: b, parameters: {weight: 0.4%s}}
"""
THREE = "dtype: float32\nmodels: [{model: a}, {model: b}, {model: c}]\n"
SLERP = "merge_method: slerp\nbase_model: a\ndtype: float32\n"
# name → a configuration.
CASES = {
    "linear": "merge_method: linear\ndtype: float32\nmodels:\n"
    "  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: [0, 1, 0.5]}}\n",
    "sum": "merge_method: linear\ndtype: float32\nparameters: {normalize: false, weight: 0.5}\n"
    "models: [{model: a}, {model: b}, {model: c}]\n",
    "slerp": SLERP + "models: [{model: b}, {model: a}]\nparameters:\n  t:\n"
    "    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}\n    - {filter: mlp, value: [1, 0]}\n    - value: 0.5\n",
    "slices": SLERP + "slices:\n"
    "  - {sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}], parameters: {t: [0.2, 0.8]}}\n"
    "  - {sources: [{model: b, layer_range: [0, 3]}, {model: a, layer_range: [1, 4]}]}\nparameters: {t: 0.5}\n",
    "passthrough": "merge_method: passthrough\ndtype: float32\nslices:\n"
    "  - {sources: [{model: a, layer_range: [0, 3]}]}\n  - {sources: [{model: b, layer_range: [1, 4]}]}\n",
    "task_arithmetic": "merge_method: task_arithmetic\ndtype: float32\nparameters: {lambda: 0.5}\n" + BASED % ("", ""),
    "normalized": "merge_method: task_arithmetic\ndtype: float32\nparameters: {normalize: true}\n" + BASED % ("", ""),
    "ties": "merge_method: ties\ndtype: float32\n" + BASED % (", density: 0.5", ", density: [0.2, 0.9]"),
    "breadcrumbs": "merge_method: breadcrumbs\ndtype: float32\nparameters: {gamma: 0.1, density: 0.6}\n"
    + BASED % ("", ""),
    "breadcrumbs_ties": "merge_method: breadcrumbs_ties\ndtype: float32\nparameters: {gamma: 0, density: 0.6}\n"
    + BASED % ("", ""),
    "dare_linear": "merge_method: dare_linear\ndtype: float32\n" + BASED % ("", ""),
    "model_stock": "merge_method: model_stock\nbase_model: base\n" + THREE,
    "karcher": "merge_method: karcher\n" + THREE,
    "multislerp": "merge_method: multislerp\ndtype: float32\n" + BASED % ("", ""),
    "nearswap": "merge_method: nearswap\nbase_model: base\ndtype: float32\nparameters: {t: 0.05}\n"
    "models: [{model: b}]\n",
    "short": "merge_method: linear\ndtype: float32\nout_dtype: bfloat16\nparameters: {weight: 1}\n"
    "models: [{model: a}, {model: b}]\n",
}


def write_models(folder):
    """Write the models a, b, c and base as folders, as Hugging Face has them."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        rng = np.random.default_rng(seed)
        shared = np.random.default_rng(9)
        leaves = {
            path: (shared.standard_normal(shape) + 0.3 * rng.standard_normal(shape)).astype(np.float32)
            for path, shape in SHAPES.items()
        }
        (folder / name).mkdir()
        save_file(leaves, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG, indent=2))


def outcomes():
    """Name → path → what mergekit makes."""
    stored = np.load(FILE)
    found = {}
    for case in CASES:
        paths, at, flat = sorted(json.loads(str(stored[f"{case}/paths"]))), 0, stored[case]
        found[case] = {}
        for path in paths:
            shape = SHAPES[path.replace(path.split(".")[2], "0", 1)] if ".layers." in path else SHAPES[path]
            size = int(np.prod(shape))
            found[case][path] = flat[at : at + size].reshape(shape)
            at += size
    return found


def main():
    import tempfile

    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    folder = Path(tempfile.mkdtemp())
    write_models(folder)
    stored = {}
    for case, text in CASES.items():
        text = re.sub(r"(model: )(\w+)", rf"\1{folder}/\2", text)  # others would be looked up on the hub
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(config, str(folder / case), MergeOptions(copy_tokenizer=False, quiet=True))
        (file,) = (folder / case).glob("*.safetensors")
        leaves = load_file(file)
        stored[case] = np.concatenate([leaves[path].float().numpy().reshape(-1) for path in sorted(leaves)])
        stored[f"{case}/paths"] = np.array(json.dumps(sorted(leaves)))
    np.savez_compressed(FILE, **stored)


if __name__ == "__main__":
    main()
