"""The steps of the demo. Each is one line of Paramend, and evidence that it did what it claims."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import safetensors.numpy

from paramend.checkpoints.checkpoint import open as open_checkpoint
from paramend.demo.network import Classifier
from paramend.demo.patient import Patient, save
from paramend.demo.step import DemoStep, Outcome, data_digest, digest, moved, outcome, touched
from paramend.demo.twin import twin_logits, twin_of
from paramend.edits.selection import at, param_count
from paramend.formats.safetensors import SafetensorsFile
from paramend.freezing.freeze import freeze
from paramend.grafting.graft import graft
from paramend.growth.zeroing import init_zero_
from paramend.reports.tables import aligned

STEPS: list[DemoStep] = []
_Run = Callable[[Patient], Outcome]


def _step(name: str, title: str, code: str) -> Callable[[_Run], _Run]:
    def entered(run: _Run) -> _Run:
        STEPS.append(DemoStep(name, title, code, run))
        return run

    return entered


@_step("look", "Train a classifier, look at its tree", "paramend show paramend-demo/digits.safetensors")
def _look(patient: Patient) -> Outcome:
    fresh, params = patient.fresh, patient.params
    loaded = at(fresh, "**").set(safetensors.numpy.load_file(patient.file))
    with SafetensorsFile(patient.file) as file:
        table = [(file.index.path(n), str(file.spec(n))) for n in file.index.numbers]
    claims = {
        "it reads more than 9 of 10 digits that it has never seen": patient.accuracy(params) > 0.9,
        "the file holds every leaf, byte for byte": not moved(params, loaded),
    }
    detail = [*aligned(table), f"{param_count(params):,} parameters in {len(table)} leaves"]
    return outcome(fresh, params, patient.accuracy, claims, detail)


@_step("replace", "Replace a kernel: the first one, at rank 8", 'pm.at(params, "**/Dense_0/kernel").set(kernel)')
def _replace_kernel(patient: Patient) -> Outcome:
    params = patient.params
    kernel = low_rank(at(params, "**/Dense_0/kernel").one(), rank=8)
    edited = at(params, "**/Dense_0/kernel").set(kernel)
    claims = {
        "only that kernel changed": moved(params, edited) == ["params/Dense_0/kernel"],
        "it holds the new values, byte for byte": digest(at(edited, "**/Dense_0/kernel").one()) == digest(kernel),
        "every other leaf is the same object": touched(params, edited) == ["params/Dense_0/kernel"],
    }
    return outcome(params, edited, patient.accuracy, claims)


def low_rank(kernel: Any, rank: int) -> np.ndarray[Any, Any]:
    """The nearest kernel of this rank."""
    left, scales, right = np.linalg.svd(np.asarray(kernel), full_matrices=False)
    return (left[:, :rank] * scales[:rank]) @ right[:rank]  # type: ignore[no-any-return]


@_step("zero", "Zero the last kernel", 'pm.at(params, "**/Dense_[-1]/kernel").zero()')
def _zero_last_kernel(patient: Patient) -> Outcome:
    params = patient.params
    edited = at(params, "**/Dense_[-1]/kernel").zero()
    logits, bias = patient.logits(edited), np.asarray(at(edited, "**/Dense_[-1]/bias").one())
    loudest = bias.argmax()
    share = float((patient.digits.labels == loudest).mean())
    claims = {
        "only that kernel changed": moved(params, edited) == ["params/Dense_3/kernel"],
        "only the bias is left: the logits of every digit are the bias": bool((logits == bias).all()),
        "all predictions are one class": set(logits.argmax(axis=-1)) == {loudest},
        "accuracy falls to chance, the share of that class": patient.accuracy(edited) == share,
    }
    detail = [f"every digit is read as {loudest}, whose bias is the largest; {share:.1%} of them are"]
    return outcome(params, edited, patient.accuracy, claims, detail)


@_step(
    "restore", "Put it back", 'pm.at(zeroed, "**/Dense_[-1]/kernel").set(pm.at(params, "**/Dense_[-1]/kernel").get())'
)
def _restore(patient: Patient) -> Outcome:
    params = patient.params
    zeroed = at(params, "**/Dense_[-1]/kernel").zero()
    restored = at(zeroed, "**/Dense_[-1]/kernel").set(at(params, "**/Dense_[-1]/kernel").get())
    claims = {
        "every leaf is what it was, byte for byte": not moved(params, restored),
        "every logit is what it was": bool((patient.logits(params) == patient.logits(restored)).all()),
    }
    return outcome(zeroed, restored, patient.accuracy, claims)


@_step("freeze", "Freeze the first layer and train on", 'pm.freeze(adamw, "**/Dense_0/**")')
def _freeze_first_layer(patient: Patient) -> Outcome:
    params, adamw = patient.params, optax.adamw(1e-3, weight_decay=1e-2)
    tx = freeze(adamw, "**/Dense_0/**")
    trained = patient.trained_on(tx)
    rest = [path for path in at(params, "**").paths if path not in at(params, "**/Dense_0/**").paths]
    spared = param_count(adamw.init(params)) - param_count(tx.init(params))
    claims = {
        "the first layer did not move, byte for byte; every other leaf did": moved(params, trained) == rest,
        "no moments are kept for it": spared == 2 * param_count(params, "**/Dense_0/**"),
    }
    return outcome(params, trained, patient.accuracy, claims, digests(params, trained))


def digests(before: Any, after: Any) -> list[str]:
    """A line for each leaf: the digests of its bytes, and whether they are the same."""
    new = at(after, "**").get()
    rows = [(path, digest(leaf)[:12], digest(new[path])[:12]) for path, leaf in at(before, "**")]
    return aligned((path, old, "->", late, "same bytes" if old == late else "moved") for path, old, late in rows)


@_step("zero-gradients", "For contrast: only zero its gradients", 'pm.freeze(adamw, "**/Dense_0/**", how="gradients")')
def _zero_gradients(patient: Patient) -> Outcome:
    params, adamw = patient.params, optax.adamw(1e-3, weight_decay=1e-2)
    tx = freeze(adamw, "**/Dense_0/**", how="gradients")
    trained = patient.trained_on(tx)
    kernel, decayed = (np.asarray(at(tree, "**/Dense_0/kernel").one()) for tree in (params, trained))
    norm, less = np.linalg.norm(kernel), np.linalg.norm(decayed)
    same_direction = np.allclose(kernel / norm, decayed / less, atol=1e-6)
    claims = {
        "the first layer moved, although it had no gradient": digest(kernel) != digest(decayed),
        "weight decay did it: its kernel is the old one, scaled down": bool(less < norm and same_direction),
    }
    detail = [f"the norm of its kernel went from {norm:.4f} to {less:.4f}"]
    return outcome(params, trained, patient.accuracy, claims, detail)


@_step("graft", "Warm-start a deeper model", 'pm.graft(fresh, params, rename={"**/Dense_[-1]/**": "**/Dense_[-1]/**"})')
def _warm_start(patient: Patient) -> Outcome:
    params, deeper = patient.params, Classifier(blocks=2)
    fresh = first_params(deeper, patient)
    grafted, report = graft(fresh, params, rename={"**/Dense_[-1]/**": "**/Dense_[-1]/**"})
    new_block = at(fresh, "**/Dense_{3,4}/**").paths
    claims = {
        "every leaf of the small model was copied": len(report.copied) == len(at(params, "**")),
        "only the new block is fresh": sorted(row.path for row in report.fresh) == sorted(new_block),
    }
    return outcome(fresh, grafted, partial(patient.accuracy, model=deeper), claims, str(report).splitlines())


@_step("identity", "Make its new block the identity", 'pm.at(grafted, "**/Dense_4/**").zero()')
def _new_block_to_identity(patient: Patient) -> Outcome:
    params, deeper = patient.params, Classifier(blocks=2)
    fresh = first_params(deeper, patient)
    grafted, _ = graft(fresh, params, rename={"**/Dense_[-1]/**": "**/Dense_[-1]/**"})
    started = at(grafted, "**/Dense_4/**").zero()
    save(started, patient.folder / "deeper.safetensors")
    distance = np.abs(patient.logits(started, deeper) - patient.logits(params)).max()
    return outcome(
        grafted,
        started,
        partial(patient.accuracy, model=deeper),
        claims={"the logits are those of the small model: the largest difference is 0.0": bool(distance == 0.0)},
        detail=["the new block adds Dense_4(relu(Dense_3(x))) to x, which is now zero"],
    )


def first_params(model: Classifier, patient: Patient) -> Any:
    """The initial parameters of another model."""
    return model.init(jax.random.key(patient.seed + 2), patient.digits.pixels)


@_step(
    "file",
    "Zero the last kernel in the file",
    "paramend zero paramend-demo/digits.safetensors '**/Dense_[-1]/kernel' -o paramend-demo/zeroed.safetensors",
)
def _edit_file(patient: Patient) -> Outcome:
    params, file = patient.params, patient.file
    streamed, in_memory = file.with_name("zeroed.safetensors"), file.with_name("zeroed-in-memory.safetensors")
    original = data_digest(file)
    with open_checkpoint(file) as checkpoint:
        at(checkpoint, "**/Dense_[-1]/kernel").zero().save(streamed)
    save(at(params, "**/Dense_[-1]/kernel").zero(), in_memory)
    claims = {
        "file and tree end up with the same bytes": data_digest(streamed) == data_digest(in_memory),
        "the file that was read is unchanged": data_digest(file) == original,
    }
    detail = aligned((f"sha256 {data_digest(path)}", path.name) for path in (file, streamed, in_memory))
    return outcome(
        params, at(params, "**").set(safetensors.numpy.load_file(streamed)), patient.accuracy, claims, detail
    )


@_step("torch", "Zero the last weight of a torch twin, in place", 'pm.at(twin, "layers[-1].weight").zero_()')
def _edit_torch(patient: Patient) -> Outcome:
    params, pixels = patient.params, patient.digits.pixels
    before, twin = twin_of(params), twin_of(params)
    weight = twin.layers[-1].weight
    at(twin, "layers[-1].weight").zero_()
    distance = np.abs(twin_logits(before, pixels) - patient.logits(params)).max()
    in_flax = patient.logits(at(params, "**/Dense_[-1]/kernel").zero())
    claims = {
        "before the edit torch and Flax agree": bool(distance < 1e-3),
        "after it they agree bit by bit": bool((twin_logits(twin, pixels) == in_flax).all()),
        "the weight is the same object, and is still trained": weight is twin.layers[-1].weight
        and weight.requires_grad,
    }
    detail = [f"the largest difference between the logits of Flax and torch is {distance:.1e}"]
    return outcome(before, twin, lambda twin: patient.score(twin_logits(twin, pixels)), claims, detail)


@_step("init-zero", "Zero a whole torch layer", "pm.init_zero_(twin.layers[-1])")
def _zero_torch_layer(patient: Patient) -> Outcome:
    params, pixels = patient.params, patient.digits.pixels
    before, twin = twin_of(params), twin_of(params)
    init_zero_(twin.layers[-1])
    claims = {
        "only that layer changed": moved(before, twin) == ["layers.3.weight", "layers.3.bias"],
        "every logit is 0.0": not twin_logits(twin, pixels).any(),
    }
    return outcome(before, twin, lambda twin: patient.score(twin_logits(twin, pixels)), claims)
