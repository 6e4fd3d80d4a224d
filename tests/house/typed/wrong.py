"""Code that is wrong, for type checkers: each line with `wrong` behind it is flagged, and no other."""

import jax
import numpy as np
import optax
import torch
from torch import nn

import paramend as pm


def choosing(params: dict[str, jax.Array]) -> None:
    pm.opne("model.safetensors")  # wrong: no such name
    pm.at(params, 5)  # wrong: no selector
    pm.at(params, ["a", 5])  # wrong: no selector in a list
    pm.at(params, "a", count="3")  # wrong: a count is a number
    pm.sel("a") | 5  # wrong: no selector
    pm.sel("a").where(ndims=2)  # wrong: no such condition
    pm.sel("a").where(dtype=4)  # wrong: no dtype
    pm.sel(lambda path: True)  # wrong: a predicate takes path and spec
    pm.at(params, "a").zeros()  # wrong: no such verb
    pm.at(params, "a").fill("0.5")  # wrong: no number
    pm.at(params, "a").fill_("0.5")  # wrong: no number
    pm.at(params, "a").clip("0", 1)  # wrong: no number
    pm.at(params, "a").clip(0)  # wrong: a bound is missing
    pm.at(params, "a").clip_(0, most=1)  # wrong: no such bound
    pm.at(params, "a").cast_("float16")  # wrong: no such verb, as the dtype stays
    pm.at(params, "a").noise(0.1, seed="x")  # wrong: no seed
    pm.at(params, "a").cast(7)  # wrong: no dtype
    pm.at(params, "a")["b"].zero()  # wrong: no slice
    pm.at(params, "a").zero().save("out")  # wrong: only checkpoints are saved so
    pm.at(params, "a").zero_()["w"]  # wrong: nothing comes back
    pm.labels(params, {"frozen": 3})  # wrong: no selector


def checkpoints(path: str) -> None:
    pm.at(pm.open(path), "a").zero().sve("out")  # wrong: no such method
    pm.open(path).save("out", shard_size=5)  # wrong: no such option
    pm.load(path, "tensorflow")  # wrong: no such library
    pm.load(path, "torch", mmap=True)  # wrong: a tensor of torch is a copy
    pm.open(path).fetch(0, "a")  # wrong: no slice
    pm.load(path, nested=False)["a"].backward()  # wrong: an array of numpy
    pm.patch(path, lambda t: pm.at(t, "a").get())  # wrong: the edited checkpoint is wanted back
    pm.patch(path, lambda t: pm.at(t, "a").zero_())  # wrong: likewise
    pm.undo(path).rest  # wrong: no such figure
    pm.save({"a": np.ones(1)})  # wrong: where to?
    pm.Recipe(["zero"])  # wrong: steps are maps


def freezing(params: dict[str, jax.Array], module: nn.Module) -> None:
    pm.freeze(optax.adam(1e-3), "a", how="update")  # wrong: no such way
    pm.freeze(optax.adam(1e-3), "a", until="soon")  # wrong: no step
    pm.freeze(module, "a")  # wrong, say the types of the framework: no transformation
    pm.freeze_(params, "a")  # wrong, say the types of the framework: no module
    pm.freeze_(module, "a", optimizer=optax.adam(1e-3))  # wrong, say the types of the framework: no optimizer of torch
    pm.freeze_(module, "a").frozen  # wrong: no such list
    pm.init_zero_(torch.ones(3))  # wrong, say the types of the framework: no module
    pm.graft_opt_state(params, params, mismatch="overlap")  # wrong: moments are not cut
    pm.graft_opt_state(params, params, "report")  # wrong: no report
    pm.graft_optimizer_(torch.optim.SGD(module.parameters()), {}, name=["a"])  # wrong: no such option


def growing(params: dict[str, jax.Array], module: nn.Module) -> None:
    pm.graft(params, module, mismatch="skip")  # wrong: no such way
    pm.graft(params, module, mismatch={"a": "skip"})  # wrong: no such way
    pm.graft(params, module, unused="ignore")  # wrong: no such way
    pm.graft(params, module, rename={"a": 3})  # wrong: no path
    pm.graft(params, module, resize={"a": "positions"})  # wrong: no rule
    pm.graft_(module, params)[1]  # wrong: the report alone
    pm.deepen(params, order="0 1 1", layer="a")  # wrong: no such option
    pm.ablate(params, "a", lambda p: 1.0, how="zeros")  # wrong: no such method
    pm.ablate(params, "a", lambda p: "good")  # wrong: a score is a number
    pm.ablate(params, "a", lambda p: 1.0, pairs="all")  # wrong: yes or no
    pm.testing.assert_identical(params, params, only="a")  # wrong: a selector says what is compared
    pm.testing.assert_only_changed(params, params)  # wrong: what may change?
    pm.diff(params, params, sort="size")  # wrong: no such order
    pm.diff(params, params).chnaged  # wrong: no such list
    pm.resize.positions(method="nearest")  # wrong: no such method
