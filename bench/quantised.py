"""What a verb means on quantised weights: schemes by verbs, each outcome right, refused or wrong, and for each what
Paramend does and what a tool does that takes codes for the weight.

Models of each scheme are written by hand: two shards, of which one has the codes and the other the scales. Outcomes are
decoded here, by the formula of the scheme and never by what made them, and compared with the verb on decoded weights.

Libraries that decode a scheme are compared where they can be imported; none is installed.

    python bench/quantised.py [SCHEME ...]
"""

import sys
import tempfile
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from schemes import SCHEMES, SPECIAL, WHERE, model_in, read, values, write

# ---- verbs -----------------------------------------------------------------------------------------------------------


class Verb(NamedTuple):
    """An edit of one weight.

    Attributes:
        edit: `pm.at` of the weight → the new model.
        meant: the weight → what is right.
        exact: whether no bit may be off; else an outcome is right within what the scheme rounds.
    """

    edit: object
    meant: object
    exact: bool = False


def without_row(weight):
    new = weight.copy()
    new[1] = 0
    return new


VERBS = {
    "zero": Verb(lambda at: at.zero(), np.zeros_like, exact=True),
    "[1] zero": Verb(lambda at: at[1].zero(), without_row, exact=True),
    "fill 0.5": Verb(lambda at: at.fill(0.5), lambda w: np.full_like(w, 0.5)),
    "multiply 0.5": Verb(lambda at: at.multiply(0.5), lambda w: w * np.float32(0.5)),
    "multiply 0.9": Verb(lambda at: at.multiply(0.9), lambda w: w * np.float32(0.9)),
    "multiply -2": Verb(lambda at: at.multiply(-2.0), lambda w: w * np.float32(-2)),
    "add 0.25": Verb(lambda at: at.add(0.25), lambda w: w + np.float32(0.25)),
    "abs": Verb(lambda at: at.apply(np.abs), np.abs),
    "cast": Verb(lambda at: at.cast("bfloat16"), lambda w: w.astype(ml_dtypes.bfloat16).astype("f4"), exact=True),
}
ON_ARRAYS = {
    "zero": lambda a: a * 0,
    "[1] zero": without_row,
    "fill 0.5": lambda a: np.full_like(a, 0.5),
    "multiply 0.5": lambda a: a * 0.5,
    "multiply 0.9": lambda a: a * 0.9,
    "multiply -2": lambda a: a * -2.0,
    "add 0.25": lambda a: a + 0.25,
    "abs": np.abs,
    "cast": lambda a: a,
}


def by_paramend(folder, out, scheme, verb):
    import paramend as pm

    with pm.open(folder) as model:
        VERBS[verb].edit(pm.at(model, WHERE.format(SPECIAL, scheme.name))).save(out)


def by_arrays(folder, out, scheme, verb):
    """What a tool does that takes the codes for the weight: the edit on numbers, stored as what they were."""
    leaves, out = read(folder), Path(out)
    name = WHERE.format(SPECIAL, next(iter(scheme.make(np.random.default_rng(0)))))
    old = leaves[name]
    new = ON_ARRAYS[verb](old.astype("f4") if old.dtype.kind == "V" else old.astype("f8"))
    leaves[name] = new.astype("f4").astype(ml_dtypes.bfloat16) if verb == "cast" else new.astype(old.dtype)
    out.mkdir()
    write(out / "model.safetensors", leaves)


def verdict(tool, folder, out, scheme, verb):
    """ "right", "refused" or "wrong"."""
    before = read(folder)
    weight = values(before, scheme)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            tool(folder, out, scheme, verb)
    except Exception as error:
        if tool is by_paramend and not type(error).__module__.startswith("paramend"):
            raise
        return "refused"
    after = read(out)
    apart = [name for name in before if f".{SPECIAL}." not in name and before[name].tobytes() != after[name].tobytes()]
    wanted = VERBS[verb].meant(weight)
    try:
        found = values(after, scheme)
    except Exception:  # what is left is no weight
        return "wrong"
    if apart or found.shape != wanted.shape:
        return "wrong"
    if VERBS[verb].exact:
        return "right" if np.array_equal(found, wanted) else "wrong"
    with np.errstate(all="ignore"):
        off = np.linalg.norm((found - wanted).astype("f8")) / np.linalg.norm(wanted.astype("f8"))
    return "right" if off <= scheme.loss else "wrong"


# ---- libraries that decode -------------------------------------------------------------------------------------------


def by_transformers(leaves, scheme):
    """What transformers makes of the leaves of a weight, where it has code for them that runs on a processor."""
    import torch

    def tensor(leaf):
        words = torch.from_numpy(np.ascontiguousarray(leaf).view("u1").copy())
        return words.view(getattr(torch, leaf.dtype.name)).reshape(leaf.shape)

    payload, scale = map(tensor, list(leaves.values())[:2])
    if scheme.config["quant_method"] == "mxfp4":
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(payload, scale, dtype=torch.float32).numpy()
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(payload, scale, output_dtype=torch.float32).numpy()


def by_compressed_tensors(leaves, scheme):
    import torch
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**scheme.config["config_groups"]["group_0"]["weights"])
    given = {
        name.rpartition(".")[2]: torch.from_numpy(leaf.astype("f4") if leaf.dtype.kind == "V" else leaf.copy())
        for name, leaf in leaves.items()
    }
    made = PackedQuantizationCompressor.decompress(given, QuantizationScheme(targets=["Linear"], weights=args))
    return made["weight"].float().numpy()


# Library, what decodes, and of which schemes.
DECODERS = (
    ("transformers", by_transformers, lambda scheme: scheme.config["quant_method"] in ("fp8", "mxfp4")),
    ("compressed_tensors", by_compressed_tensors, lambda scheme: scheme.config.get("format") == "pack-quantized"),
)


def decoded(scheme):
    """For each library that can be imported, whether its values are those of the formula."""
    leaves, found = scheme.make(np.random.default_rng(0)), []
    for library, decode, has in DECODERS:
        if find_spec(library) is not None and has(scheme):
            try:
                values_ = decode(leaves, scheme)
            except (ValueError, RuntimeError):
                found.append(f"{library} refuses")
                continue
            right = np.array_equal(values_, scheme.decode(leaves))
            found.append(f"{library} {'agrees' if right else 'differs'}")
    return ", ".join(found) or "-"


def main(*names):
    tools = {"Paramend": by_paramend, "codes taken for the weight": by_arrays}
    head, counts = ["", *VERBS, "decoded by"], Counter()
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    chosen = {name: scheme for name, scheme in SCHEMES.items() if name in names or not names}
    for name, scheme in chosen.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "model")
            model_in(folder, scheme)
            cells = []
            for verb in VERBS:
                outs = [Path(temporary, f"{tool} {verb}") for tool in tools]
                both = [
                    verdict(each, folder, out, scheme, verb) for each, out in zip(tools.values(), outs, strict=True)
                ]
                counts.update((tool, verb, each) for tool, each in zip(tools, both, strict=True))
                cells.append(" / ".join(both))
            print(f"| {name} | {' | '.join(cells)} | {decoded(scheme)} |", flush=True)
    print(f"\nOf {len(chosen)} schemes, right / refused / wrong:\n")
    print(f"| | {' | '.join(VERBS)} |\n|{'---|' * (len(VERBS) + 1)}")
    for tool in tools:
        cells = [" / ".join(str(counts[tool, verb, each]) for each in ("right", "refused", "wrong")) for verb in VERBS]
        print(f"| {tool} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
