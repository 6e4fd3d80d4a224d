"""An example for each command, and what `paramend` says when it is called alone."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

# Command → what to type; edits that are not here take any weights. `model` is a directory of Hugging Face.
EXAMPLES = {
    "show": "paramend show model 'model.layers[-1]/**' --stats",
    "diff": "paramend diff model edited '**/self_attn/**'",
    "delete": "paramend delete model lm_head.weight -o headless",
    "rename": "paramend rename model 'model.layers.<n>.**' 'decoder.<n>.**' -o renamed.safetensors",
    "apply": "paramend apply recipe.yaml model -o edited",
    "delta": "paramend delta model tuned -o change\nparamend delta change",
    "config": "paramend config model rope_theta\nparamend config model --set rope_theta=1e6 --in-place",
    "convert": "paramend convert model model.pt\nparamend convert model sharded --max-shard-size 2GB",
    "graft": "paramend graft pretrained --into model --only 'model.layers[:2]/**' -o started",
    "port": "paramend port linear.safetensors --like dense.msgpack -o ported.msgpack",
    "stack": "paramend stack model 'model.layers[*]' -o stacked.safetensors",
    "unstack": "paramend unstack scanned.msgpack layers --into 'layers/<n>' -o numbered.msgpack",
    "concat": "paramend concat layer.safetensors gate up --into gate_up -o fused.safetensors",
    "interleave": "paramend interleave layer.safetensors gate up --into gate_up -o fused.safetensors",
    "split": "paramend split layer.safetensors qkv --into q --into k --into v -o parted.safetensors",
    "layout": "paramend layout hf_to_llama_cpp_llama model -o llama.safetensors",
    "insert": "paramend insert headless pretrained lm_head.weight -o whole",
    "part": "paramend part model 'model.layers[:2]/**' -o lower.safetensors",
    "fold": "paramend fold model adapter -o folded",
    "extract": "paramend extract tuned model --rank 2 -o extracted",
    "merge": "paramend merge model tuned --weight 0.7 --weight 0.3 -o merged",
    "tie": "paramend tie model --keep embedding -o tied",
    "untie": "paramend untie tied -o untied",
    "dequantize": "paramend dequantize quantised -o floats",
    "quantize": "paramend quantize model '**/mlp/**' --scheme fp8-channel -o quantised",
    "ablate": "paramend ablate dense.msgpack kernel bias --score score.py",
    "deepen": "paramend deepen model --blocks 2 --identity llama -o deeper",
    "widen": "paramend widen model --mlp 32 -o wider",
    "narrow": "paramend narrow model --layers 2 -o shallow",
    "experts": "paramend experts mixture --keep 0,2 -o half",
    "upcycle": "paramend upcycle model --experts 4 --top-k 2 -o mixture",
    "vocabulary": "paramend vocabulary model --pad 64 -o padded",
    "set": "paramend set model model.norm.weight value.npy -o edited",
    "project_out": "paramend project_out model '**/o_proj.weight' direction.npy --axis -2 -o edited",
    "permute": "paramend permute layer.safetensors gate 1,0 -o edited.safetensors",
    "undo": "paramend undo model",
    "history": "paramend history model",
    "verify": "paramend verify edited",
    "demo": "paramend demo --out digits",
    "lesson": "paramend lesson\nparamend lesson kernel_replace\nparamend lesson kernel_replace --grade answer.py",
    "explain": "paramend explain no-match",
    "completion": "paramend completion --install",
    "help": "paramend help selectors",
}


def shown(name: str, values: Iterable[str] = ()) -> str:
    """The example of a command, as the end of its help. An edit of leaves has one made of examples of its arguments."""
    if name not in EXAMPLES:
        words = shlex.join(values)
        return f"\b\nExample:\n  paramend {name} model '**/mlp/**'{' ' * bool(words)}{words} -o edited"
    lines = EXAMPLES[name].split("\n")
    return "\b\n" + "\n".join(["Examples:" if lines[1:] else "Example:", *(f"  {line}" for line in lines)])


_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".npz", ".msgpack", ".gguf", ".orbax", ".dcp")


def _found() -> str:
    """A checkpoint in this folder; a name to put one's own for, if there is none."""
    try:
        names = sorted(entry.name for entry in os.scandir() if entry.name.lower().endswith(_CHECKPOINTS))
    except OSError:
        names = []
    if any(Path(name).exists() for name in ("model.safetensors.index.json", "config.json")) and names:
        return "."
    return names[0] if names else "model.safetensors"


def to_try() -> str:
    """What to type first, with a checkpoint of this folder."""
    found = _found()
    path, out = shlex.quote(found), f"edited{Path(found).suffix}"
    rows = [
        ("paramend demo", "the five surgeries on a classifier of digits"),
        ("paramend lesson", "learn them: worked problems that grade your answer"),
        (f"paramend show {path}", "the leaves of a checkpoint"),
        (f"paramend zero {path} '**/bias' -o {out}", "an edit, into a new checkpoint"),
        (f"paramend diff {path} {out} --only '**/bias'", "the evidence that nothing else moved"),
        ("paramend help selectors", "how leaves are selected"),
        ("paramend --help", "all commands; of one: paramend COMMAND --help"),
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"  {what:<{width}}  {says}" for what, says in rows]
    return "\n".join(["Surgery for model parameters. To try:", "", *lines])
