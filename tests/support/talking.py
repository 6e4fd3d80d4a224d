"""Whether llama.cpp computes what transformers does, with files that are written here. Needs llama-cpp-python:

    python tests/support/talking.py MODEL/ FOLDER [TEXT]

MODEL is a folder of transformers, of a family that is translated; files go into FOLDER. It prints whether a text is cut
into the same tokens, how far scores are apart, and whether the same tokens come next: of the model, and after a layer
was left out and a key changed in place.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import paramend as pm
from paramend.cli.main import cli


def compared(name, module, file, ids):
    """Prints how a file differs from a module."""
    from llama_cpp import Llama

    with torch.no_grad():
        right = module(torch.tensor([ids])).logits[0].numpy()
        seen = module.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0][len(ids) :].tolist()
    model = Llama(str(file), n_ctx=256, logits_all=True, verbose=False)
    model.eval(ids)
    gap = np.abs(np.array(model.scores[: len(ids)]) - right).max()
    model.reset()
    found = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(token)
        if len(found) == len(seen):
            break
    agree = "agree" if found == seen else "differ"
    print(f"{name}: scores differ by {gap:.2g} of {np.abs(right).max():.2g}; next tokens {agree}")
    return model


def main(source, folder, text="the quick brown fox, hello you"):
    folder = Path(folder)
    assert not CliRunner().invoke(cli, ["convert", source, str(folder / "m.gguf"), "--force"]).exit_code
    module, tokenizer = (
        AutoModelForCausalLM.from_pretrained(source).eval().float(),
        AutoTokenizer.from_pretrained(source),
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = compared("converted", module, folder / "m.gguf", ids)
    print(f"tokens {'agree' if model.tokenize(text.encode(), add_bos=False) == ids else 'differ'}")
    with pm.open(folder / "m.gguf") as checkpoint:
        order = [*range(pm.anatomy(checkpoint).layers["count"])][1:]
        pm.deepen(checkpoint, order=order, identity=None)[0].save(folder / "d.gguf", force=True)
    pm.patch(folder / "d.gguf", lambda tree: pm.config(tree).set({"general.name": "a long name " * 40}))
    compared("without its first layer", pm.deepen(module, order=order, identity=None)[0], folder / "d.gguf", ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
