"""Adapters as PEFT writes them, and the models that it merges them into, in float64.

Run as a script it makes `adapters_reference.npz` anew, with PEFT and transformers; tests read that file, so that PEFT
is not needed to run them.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = Path(__file__).with_suffix(".npz")


class Case(NamedTuple):
    """One model and its adapter.

    Attributes:
        name: what is special.
        config: the configuration of the base, {} if it has none.
        base: its leaves.
        settings: `adapter_config.json`.
        adapter: the leaves of the adapter.
        merged: the leaves of the base after `merge_and_unload`.
    """

    name: str
    config: dict
    base: dict
    settings: dict
    adapter: dict
    merged: dict


def cases():
    """All cases of the file, by name."""
    with np.load(FILE) as file:
        meta = json.loads(file["meta"].tobytes())
        held = {name: file[name] for name in file.files}
    found = {}
    for name, config, settings, *sides in meta:
        base, adapter, merged = ({key: held[f"{name}/{n}/{key}"] for key in keys} for n, keys in enumerate(sides))
        found[name] = Case(name, config, base, settings, adapter, base | merged)
    return found


def save(made):
    """Write the file: of merged leaves those that differ."""
    arrays, meta = {}, []
    for name, config, base, settings, adapter, merged in made:
        new = {key: value for key, value in merged.items() if key not in base or not np.array_equal(value, base[key])}
        for side, leaves in enumerate((base, adapter, new)):
            arrays |= {f"{name}/{side}/{key}": value for key, value in leaves.items()}
        meta.append((name, config, settings, list(base), list(adapter), list(new)))
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez_compressed(FILE, **arrays)


def _cases():
    import tempfile
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    warnings.filterwarnings("ignore")
    torch.set_default_dtype(torch.float64)

    class Experts(nn.Module):
        def __init__(self, shapes, *, transposed=False):
            super().__init__()
            self.is_transposed = transposed
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(shape)))

    class Config(PretrainedConfig):
        model_type = "tiny"

    class Tied(PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.embed_tokens, self.lm_head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)

        def get_input_embeddings(self):
            return self.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

    def model(**parts):
        made = nn.Module()
        made.model = nn.ModuleDict(parts)
        made.config = {"model_type": "custom"}
        return made

    def made(name, module, *, config=None, **given):
        torch.manual_seed(len(name) * 1000 + sum(map(ord, name)))
        for weight in module.parameters():
            nn.init.normal_(weight)
        base = {key: value.detach().clone().numpy() for key, value in module.state_dict().items()}
        tuned = get_peft_model(module, LoraConfig(**{"r": 2, "lora_alpha": 3, **given}), autocast_adapter_dtype=False)
        for key, value in tuned.named_parameters():
            if "magnitude" in key:
                nn.init.uniform_(value, 0.5, 2)
            elif value.requires_grad or "trainable_tokens" in key:
                nn.init.normal_(value)
        with tempfile.TemporaryDirectory() as folder:
            tuned.save_pretrained(folder)
            settings = json.loads(Path(folder, "adapter_config.json").read_text())
            adapter = {key: value.numpy() for key, value in load_file(f"{folder}/adapter_model.safetensors").items()}
        kept = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
        kept = (*kept, "peft_type", "peft_version", "target_parameters", "trainable_token_indices", "lora_bias")
        kept = (*kept, "modules_to_save", "layer_replication", "init_lora_weights", "bias")
        settings = {key: settings[key] for key in kept if settings.get(key) not in (None, {}, [])}
        merged = {}
        with suppress(NotImplementedError):  # of grouped convolutions
            merged = {key: value.detach().numpy() for key, value in tuned.merge_and_unload().state_dict().items()}
        return Case(name, config or {}, base, settings, adapter, merged)

    def linears():
        return model(q=nn.Linear(4, 6), k=nn.Linear(4, 4), norm=nn.LayerNorm(4))

    def gpt2():
        return model(c_attn=Conv1D(9, 3), c_proj=Conv1D(3, 3), lm_head=nn.Linear(3, 3, bias=False))

    def convs():
        return model(c1=nn.Conv1d(3, 4, 3), c2=nn.Conv2d(3, 4, (2, 3)), c3=nn.Conv3d(2, 3, 2), one=nn.Conv2d(3, 3, 1))

    def experts(transposed, up=(3, 8, 5), down=(3, 5, 4)):
        if transposed:
            up, down = ((e, i, o) for e, o, i in (up, down))
        return model(experts=Experts({"gate_up_proj": up, "down_proj": down}, transposed=transposed))

    def layered():
        found = nn.Module()
        found.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(3, 3)}) for _ in range(3))
        found.config = Config(num_hidden_layers=3)
        return found

    both = ["experts.gate_up_proj", "experts.down_proj"]
    pattern = {"rank_pattern": {"q": 3}, "alpha_pattern": {"model.k": 7, "^model.q": 5}}
    yield made("linear", linears(), target_modules=["q", "k"])
    yield made("rslora", linears(), target_modules=["q", "k"], use_rslora=True)
    yield made("patterns", linears(), target_modules=["q", "k"], **pattern)
    yield made("patterns rslora", linears(), target_modules=["q", "k"], use_rslora=True, **pattern)
    yield made("dora", linears(), target_modules=["q", "k"], use_dora=True)
    yield made("lora_bias", linears(), target_modules=["q"], lora_bias=True)
    yield made("bias all", linears(), target_modules=["q"], bias="all")
    yield made("modules_to_save", linears(), target_modules=["q"], modules_to_save=["norm"])
    yield made("conv1d", gpt2(), config={"model_type": "gpt2"}, target_modules=["c_attn", "c_proj", "lm_head"])
    only = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    yield made("conv1d dora", gpt2(), config={"model_type": "gpt2"}, use_dora=True, **only)
    yield made("convolutions", convs(), target_modules=["c1", "c2", "c3", "one"])
    yield made("convolutions dora", convs(), target_modules=["c1", "c2", "c3", "one"], use_dora=True)
    yield made("grouped", model(c=nn.Conv2d(4, 4, 3, groups=2)), target_modules=["c"])
    yield made("embedding", model(e=nn.Embedding(7, 4)), target_modules=["e"])
    yield made("embedding dora", model(e=nn.Embedding(7, 4)), target_modules=["e"], use_dora=True)
    yield made("embedding square", model(e=nn.Embedding(4, 4)), target_modules=["e"])
    tokens = {"trainable_token_indices": {"e": [5, 1]}}
    yield made("tokens", model(e=nn.Embedding(7, 4), q=nn.Linear(4, 3)), target_modules=["q"], **tokens)
    yield made("experts", experts(False), target_modules=[], target_parameters=both)
    yield made("experts turned", experts(True), target_modules=[], target_parameters=both[::-1])
    square = {"up": (3, 4, 4), "down": (3, 4, 2)}
    config = {"model_type": "qwen3_moe"}, {"model_type": "gpt_oss"}
    yield made("experts square", experts(False, **square), config=config[0], target_modules=[], target_parameters=both)
    yield made(
        "experts square turned", experts(True, **square), config=config[1], target_modules=[], target_parameters=both
    )
    yield made(
        "experts patterns",
        experts(False),
        target_modules=[],
        target_parameters=both,
        rank_pattern={"experts.down_proj": 3},
        alpha_pattern={"experts.gate_up_proj": 5},
    )
    yield made(
        "parameter", model(gate=Experts({"weight": (3, 3)})), target_modules=[], target_parameters=["gate.weight"]
    )
    untied = Tied(Config(tie_word_embeddings=False))
    yield made("base_layer", untied, config={"tie_word_embeddings": False}, target_modules=["embed_tokens", "lm_head"])
    yield made(
        "layers", layered(), config={"num_hidden_layers": 3}, target_modules=["q"], layer_replication=[[0, 2], [1, 3]]
    )


if __name__ == "__main__":
    save(list(_cases()))
