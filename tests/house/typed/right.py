"""Code as users write it, for type checkers: nothing here runs, and all of it is right."""

import re
from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch import nn

import paramend as pm


class Params(dict[str, jax.Array]):
    """A tree of a type of its own."""


def is_matrix(path: str, spec: pm.Spec) -> bool:
    return spec.ndim == 2 and path.endswith("kernel")


def choosing(params: dict[str, dict[str, jax.Array]], model: nn.Module, mask: dict[str, Any]) -> list[pm.SelectorLike]:
    chosen = pm.at(params, "**/kernel", count=2)
    assert_type(chosen, pm.Selection[dict[str, dict[str, jax.Array]]])
    assert_type(chosen.paths, list[str])
    assert_type(len(chosen), int)
    for path, leaf in chosen:
        print(path.upper(), leaf.shape)
    selector = (pm.sel("a/**") | re.compile("b/.*")) & ~pm.sel(is_matrix)
    assert_type(selector, pm.Selector)
    assert_type(selector.where(ndim=2, dtype=jnp.float32, min_size=3)[0, :4], pm.Selector)
    pm.sel("**").where(dtype=torch.bfloat16)
    pm.sel("**").where(dtype=np.dtype("int8"))
    pm.labels(params, {"frozen": "**/Dense_0/**", "train": pm.sel("**")})
    assert_type(pm.param_count(model, nn.Linear), int)
    pm.at(params, pm.at(params, "**/bias").mask())
    return [
        "a",
        re.compile("a"),
        nn.Linear,
        nnx.Linear,
        is_matrix,
        lambda path, spec: spec.size > 3 and "bias" in path,
        {"a": {"kernel": True, "bias": False}},
        mask,
        ["a", re.compile("b"), pm.sel("c")],
        selector,
    ]


def editing(params: Params, kernel: np.ndarray[Any, np.dtype[np.float32]], key: jax.Array) -> Params:
    params = pm.at(params, "**/kernel").zero()
    assert_type(pm.at(params, "**/bias").fill(0.5), Params)
    pm.at(params, "a").fill(np.float32(1))
    pm.at(params, "a").fill(jnp.ones(()))
    pm.at(params, "a").set(kernel)
    pm.at(params, "a").set({"a": kernel})
    pm.at(params, "a").multiply(2)
    pm.at(params, "a").add(jnp.ones(3))
    pm.at(params, "a").clip(-1, None)
    pm.at(params, "a").clip(np.float32(0), hi=jnp.ones(()))
    pm.at(params, "a").apply(jnp.abs)
    pm.at(params, "a").apply(lambda x: x * 2, keep_spec=False)
    pm.at(params, "a").cast("bfloat16").keys()
    pm.at(params, "a").cast(jnp.bfloat16)
    pm.at(params, "a").noise(0.1, seed=key)
    pm.at(params, "a").reinit("lecun_normal", seed=1)
    pm.at(params, "a").reinit(jax.nn.initializers.lecun_normal(), seed=key)
    pm.at(params, "a")[-1].zero()
    pm.at(params, "a")[..., 2:4, None].zero()
    assert_type(pm.at(params, "a").zero_(), None)
    assert_type(pm.at(params, "a").clip_(-1, 1), None)
    assert_type(pm.at(params, "a").noise_(0.1, seed=key), None)
    return pm.at(params, "h_<n>/**").rename("layers/<n>/**")


def checkpoints(path: str) -> int:
    with pm.open(path) as checkpoint:
        assert_type(checkpoint, pm.Checkpoint)
        print(checkpoint.fetch(0, slice(0, 2)).sum(), checkpoint.patched_by.format(".zero()"))
        edited = pm.at(checkpoint, "**/layers[-1]/mlp/down_proj/weight").zero()
        assert_type(edited, pm.Checkpoint)
        report = edited.save(Path("out"), force=True, max_shard_size="5GB", progress=lambda event: print(event.rate))
        print(report.bytes_copied + report.bytes_computed, report.to_dict()["path"], report.plan.changed[0].path)
    patched = pm.patch(path, lambda t: pm.at(t, "**/bias").zero())
    print(patched.bytes_written.bit_length(), patched.summary.upper())
    assert_type(pm.undo(path).left, int)
    assert_type([row.edit for row in pm.history(path)], list[str])
    record = pm.record(path)
    if record is not None:
        print([leaf.sha256 for leaf in record.leaves])
    pm.load(path)["fc"]["bias"].sum()
    pm.load(path, nested=False)["fc.bias"].tolist()
    assert_type(pm.load(path, nested=False, mmap=True), dict[str, np.ndarray[Any, Any]])
    pm.load(path, "jax", nested=True)["fc"]["bias"].sum()
    assert_type(pm.load(path, "torch", nested=False), dict[str, torch.Tensor])
    assert_type(pm.load(path, "jax", nested=False), dict[str, jax.Array])
    return pm.save({"a": np.ones(3)}, path).bytes_computed


def recipes(tree: Params, module: nn.Module) -> Params:
    recipe = pm.Recipe([{"zero": "head/bias"}, {"fill": {"at": "**/kernel", "value": 0.5}}])
    recipe.apply_(module)
    assert_type(pm.Recipe.load("fix.yaml"), pm.Recipe)
    pm.patch("model.safetensors", recipe.apply)
    return recipe.apply(tree)


def freezing(params: Params, module: nn.Module) -> list[str]:
    tx = pm.freeze(optax.adamw(1e-3), "**/Dense_0/**")
    assert_type(tx, optax.GradientTransformationExtraArgs)
    tx = pm.freeze(tx, ["a", pm.sel("b")], how="updates", until={"**/Dense_0/**": 1000}, since=lambda step: step > 3)
    updates, _ = tx.update(params, tx.init(params), params)
    optax.apply_updates(params, updates)
    assert_type(pm.frozen(params, tx).state_nbytes, int | None)

    def loss(params: Params, batch: jax.Array) -> jax.Array:
        return (params["w"] * batch).sum()

    value, gradient = pm.value_and_grad(loss, "**/Dense_0/**")(params, jnp.ones(3))
    assert_type(value, jax.Array)
    print(gradient["w"])
    optimizer = torch.optim.AdamW(module.parameters())
    assert_type(pm.init_zero_(nn.Linear(2, 2)), nn.Linear)
    frozen = pm.freeze_(module, "encoder.**", optimizer=optimizer)
    print(frozen.did, [row.spec for row in frozen.rows], frozen.headline(), pm.unfreeze_(module, nn.Linear).to_dict())
    return frozen


def growing(params: Params, module: nn.Sequential, checkpoint: pm.Checkpoint) -> None:
    rules: dict[str, str | None] = {"h/<n>/**": "layers/<n>/**", "head/**": None}
    tree, report = pm.graft(params, module, rename=rules, mismatch={"a": "overlap"}, unused="ok", dtype="source")
    assert_type(tree, Params)
    print([row.path for row in report.copied + report.fresh + report.mismatched + report.unused])
    pm.graft(params, module, rename={"h/<n>/**": "layers/<n>/**"}, resize={"**/pos_embed": pm.resize.positions()})
    pm.graft_(module, checkpoint, mismatch="keep", only=nn.Linear).to_html("graft.html")
    written, _ = pm.graft(checkpoint, params)
    written.save("out.safetensors")
    deeper, _ = pm.deepen(module, layers="layers[*]", order=pm.depth.blocks(12, count=4), identity=["mlp.down"])
    assert_type(deeper, nn.Sequential)
    assert_type(pm.deepen(params, order=[0, 0, 1])[1].new, pm.Selector | None)
    assert_type(pm.merge([params, params], "slerp", t=0.3, at={"**/w": {"t": 0.5}})[0], Params)
    soup, merged = pm.merge([checkpoint, checkpoint], weights=[1, 2], missing="keep", stats="mean")
    print(soup.save("soup.safetensors"), [row.origin for row in merged.rows])
    assert_type(pm.stack_layers(params, "layers_<n>", into="layers"), Params)
    assert_type(pm.concat(params, ["q", "k"], into="qk", axis=1), Params)
    assert_type(pm.interleave(checkpoint, ["gate", "up"], into="gate_up"), pm.Checkpoint)
    assert_type(pm.split(params, "qk", into=["q", "k"], sizes=[4, 2]), Params)
    assert_type(pm.insert(params, checkpoint, "mtp.**", rename={"mtp.**": "model.mtp.**"})[0], Params)
    assert_type(pm.part(checkpoint, "text.**", rename={"text.**": "**"})[0], pm.Checkpoint)
    assert_type(pm.untie(checkpoint)[0], pm.Checkpoint)
    assert_type(pm.tie(params, keep="head")[0], Params)
    assert_type(pm.anatomy(params, {"num_hidden_layers": 2}).hidden, int | None)
    assert_type(pm.vocabulary(checkpoint).extend(["<a>"], init="subwords")[0], pm.Checkpoint)
    assert_type(pm.dequantize(checkpoint, "**/mlp/**", dtype=None)[0], pm.Checkpoint)
    assert_type(pm.fold(params, ["adapter", "lora.safetensors"], scale=0.5, untie=True)[0], Params)
    pm.extract(params, checkpoint, energy=0.9)[0].save("adapter")
    assert_type(pm.quantize(params, "**", scheme="int4", simulate=True)[0], Params)
    codec = pm.Codec("steps", ("codes", "step"), decode=jnp.multiply)
    assert_type(pm.at(params, "fc.codes", codec=codec).multiply(0.5), Params)
    config: pm.Config = pm.config(checkpoint)
    assert_type(config.set({"a.b": 1}), pm.Checkpoint)
    fused, moved = pm.Layout([{"from": "a.<n>", "to": "b.<n>"}], rest="keep").to(params)
    assert_type(fused, Params)
    assert_type(moved, pm.LayoutReport)
    print([row.origin for row in moved.rows], [pm.layout(name).back(checkpoint)[0] for name in pm.layouts()])
    pm.at(params, "w").transpose((1, 0))
    pm.at(checkpoint, "w").take(slice(0, 4), axis=1)
    assert_type(pm.init.zero_residual(params), Params)
    pm.check_live(module, lambda m: m(torch.ones(1)).sum(), steps=2).at(1)
    pm.ablate(params, {"a": "a/**", "b": pm.sel("b")}, lambda p: float(p["a"].sum()), how="mean", pairs=True)[
        "a"
    ].delta.hex()
    ported, told = pm.port(params, module, rename={"0": "Dense_0", "1": None}, rules={"a": [{"transpose": [1, 0]}]})
    assert_type(ported, Params)
    print(told.warnings, told.unproven, told.layout and told.layout.to(params), told.proof and told.proof.outputs)
    pm.port_(module, checkpoint, prove=(torch.ones(1),)).to_html("port.html")
    proof = pm.prove(module, torch.tanh, (torch.ones(1),), pairs=[("a", "b")])
    print(bool(proof), proof.first and proof.first.target, proof.outputs[0].relative)
    pm.ablate(module, "layers/<n>/**", lambda m: m(torch.ones(1)).sum(), how=lambda x: x * 0)


def rarer(model: nnx.Module, params: Params, module: nn.Sequential, optimizer: torch.optim.SGD, report: Any) -> None:
    nnx.state(model, pm.nnx_filter(model, "layers[-1]/**"))
    print(pm.deepen_(module, order=[0, 0], layers=pm.sel("layers[*]"), identity={"mlp.down": 0.0}).layers[0].did)
    state, grafted = pm.graft_opt_state(optax.adam(1e-3).init(params), {}, report, unused="ok")
    print(grafted.totals["copied"]["leaves"], optax.tree_utils.tree_get(state, "count"))
    pm.graft_optimizer_(optimizer, optimizer.state_dict(), report, target=module).headline()
    _, carried = pm.graft_opt_state(state, {}, mismatch="keep")
    print(carried.fresh, pm.graft_optimizer_(optimizer, optimizer, names=["a"]).copied)
    wider, widths = pm.widen(params, features={"Dense_0": 4}, method="zero")
    print(pm.widen_(module, hidden=64, heads=8).sizes, pm.graft_opt_state(state, {}, widths)[1].totals)
    print(pm.narrow(wider, {"mlp": 4, "heads": [0, 1]}, by={"mlp": np.ones(8)})[1].kept)
    mixed, routed = pm.experts(params).keep({0: [1], "mtp": [0]})
    assert_type(pm.experts(mixed).duplicate(2)[0], Params)
    assert_type(pm.upcycle(module, experts=8, top_k=2, router=torch.ones(8, 4), drop=0.5)[0], nn.Sequential)
    print(routed.layers, pm.experts(params).drop([0])[1].said, pm.experts(module).mixture.top_k)
    assert_type(pm.residual_writers(module, torch.ones(1, 2), layers="layers[*]"), dict[str, float])
    pm.residual_writers(lambda params, x: x + params["w"] * x, np.ones(3), params={"w": np.ones(3)})
    assert_type(pm.block_influence(module, [torch.ones(1)], layers="layers.<n>"), dict[str, float])
    assert_type(pm.unstack_layers(params, "layers", into="layers_<n>", like={}), Params)
    assert_type(pm.verify_record("model.safetensors"), list[str])


def evidence(params: Params, path: Path) -> dict[str, str]:
    change: pm.Delta = pm.delta(params, path, encoding="xor")
    change.then(pm.Delta.load(path)).save(path)
    assert_type(change.apply(params), Params)
    difference = pm.diff(before=params, after=path, selector="**", only="head/**", sort="path")
    if difference:
        print(difference.changed[0].max_abs, difference.renamed, difference.unexpected)
    difference.plot().savefig("diff.svg")
    assert_type(pm.verify(params, path, only=["**/bias"]), list[str])
    pm.testing.assert_only_changed(before=params, after=params, only="**/kernel", allow_noop=True)
    pm.testing.assert_identical(before=params, after=params, selector=["**/bias"])
    print([row.norm for row in pm.stats(path, spectral="**/kernel").leaves])
    try:
        pm.at(params, "a")
    except pm.errors.NoMatch as error:
        print(error.near, error.hint, error.code)
    except pm.errors.BadRecipe as error:
        print([problem.address for problem in error.problems])
    print(pm.__version__.split("."))
    return difference.changes
