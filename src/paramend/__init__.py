"""Surgery for model parameters: pick leaves by path, change exactly those, know that nothing else moved."""

import importlib
from typing import TYPE_CHECKING

# What tools read. `_LATER` and `_MODULES` say the same to the interpreter; a test compares them.
if TYPE_CHECKING:
    from paramend import errors as errors, resize as resize, testing as testing
    from paramend.ablation.ablate import ablate as ablate
    from paramend.ablation.influence import block_influence as block_influence
    from paramend.checkpoints.anatomy import anatomy as anatomy
    from paramend.checkpoints.checkpoint import Checkpoint as Checkpoint, open as open
    from paramend.checkpoints.config import Config as Config, config as config
    from paramend.checkpoints.patching import patch as patch
    from paramend.checkpoints.tying import tie as tie, untie as untie
    from paramend.checkpoints.whole import load as load, save as save
    from paramend.deltas.comparing import delta as delta
    from paramend.deltas.delta import Delta as Delta
    from paramend.edits.selection import Selection as Selection, at as at, labels as labels, param_count as param_count
    from paramend.evidence.diff import diff as diff, verify as verify
    from paramend.evidence.stats import stats as stats
    from paramend.freezing.freeze import (
        freeze as freeze,
        freeze_ as freeze_,
        frozen as frozen,
        nnx_filter as nnx_filter,
        unfreeze_ as unfreeze_,
        value_and_grad as value_and_grad,
    )
    from paramend.grafting.graft import graft as graft, graft_ as graft_
    from paramend.grafting.parts import insert as insert, part as part
    from paramend.grafting.states.verbs import graft_opt_state as graft_opt_state, graft_optimizer_ as graft_optimizer_
    from paramend.growth import depth as depth, init as init
    from paramend.growth.deepening import deepen as deepen, deepen_ as deepen_
    from paramend.growth.experts import experts as experts
    from paramend.growth.liveness import check_live as check_live
    from paramend.growth.narrowing import narrow as narrow
    from paramend.growth.upcycling import upcycle as upcycle
    from paramend.growth.widening import widen as widen, widen_ as widen_
    from paramend.growth.writers import residual_writers as residual_writers
    from paramend.growth.zeroing import init_zero_ as init_zero_
    from paramend.journal.undo import history as history, undo as undo
    from paramend.leaves.rules import Codec as Codec
    from paramend.leaves.specs import Spec as Spec
    from paramend.mapping.joining import concat as concat, interleave as interleave, split as split
    from paramend.mapping.layout import Layout as Layout, layout as layout, layouts as layouts
    from paramend.mapping.report import LayoutReport as LayoutReport
    from paramend.merging.extracting import extract as extract
    from paramend.merging.folding import fold as fold
    from paramend.merging.merge import merge as merge
    from paramend.porting.port import port as port, port_ as port_
    from paramend.porting.proof import prove as prove
    from paramend.quantizing.dequantizing import dequantize as dequantize
    from paramend.quantizing.quantizing import quantize as quantize
    from paramend.recipes.recipe import Recipe as Recipe
    from paramend.rewriting.provenance import record as record
    from paramend.rewriting.verification import verify_record as verify_record
    from paramend.selectors.selector import Selector as Selector, SelectorLike as SelectorLike, sel as sel
    from paramend.stacking.stack import stack_layers as stack_layers, unstack_layers as unstack_layers
    from paramend.tokens.vocabulary import vocabulary as vocabulary

    __version__: str

# A name's module is opened when the name is first asked for: no program pays for what it does not use.
_LATER = {
    name: module
    for module, names in {
        "paramend.ablation.ablate": ("ablate",),
        "paramend.ablation.influence": ("block_influence",),
        "paramend.checkpoints.anatomy": ("anatomy",),
        "paramend.checkpoints.checkpoint": ("Checkpoint", "open"),
        "paramend.checkpoints.config": ("Config", "config"),
        "paramend.checkpoints.tying": ("tie", "untie"),
        "paramend.checkpoints.whole": ("load", "save"),
        "paramend.deltas.comparing": ("delta",),
        "paramend.deltas.delta": ("Delta",),
        "paramend.evidence.diff": ("diff", "verify"),
        "paramend.edits.selection": ("Selection", "at", "labels", "param_count"),
        "paramend.freezing.freeze": ("freeze", "freeze_", "frozen", "nnx_filter", "unfreeze_", "value_and_grad"),
        "paramend.grafting.graft": ("graft", "graft_"),
        "paramend.grafting.states.verbs": ("graft_opt_state", "graft_optimizer_"),
        "paramend.evidence.stats": ("stats",),
        "paramend.growth.deepening": ("deepen", "deepen_"),
        "paramend.growth.experts": ("experts",),
        "paramend.growth.liveness": ("check_live",),
        "paramend.growth.narrowing": ("narrow",),
        "paramend.growth.upcycling": ("upcycle",),
        "paramend.growth.widening": ("widen", "widen_"),
        "paramend.growth.writers": ("residual_writers",),
        "paramend.growth.zeroing": ("init_zero_",),
        "paramend.checkpoints.patching": ("patch",),
        "paramend.porting.proof": ("prove",),
        "paramend.quantizing.dequantizing": ("dequantize",),
        "paramend.quantizing.quantizing": ("quantize",),
        "paramend.recipes.recipe": ("Recipe",),
        "paramend.rewriting.provenance": ("record",),
        "paramend.rewriting.verification": ("verify_record",),
        "paramend.selectors.selector": ("Selector", "SelectorLike", "sel"),
        "paramend.leaves.rules": ("Codec",),
        "paramend.leaves.specs": ("Spec",),
        "paramend.grafting.parts": ("insert", "part"),
        "paramend.mapping.joining": ("concat", "interleave", "split"),
        "paramend.mapping.layout": ("Layout", "layout", "layouts"),
        "paramend.mapping.report": ("LayoutReport",),
        "paramend.merging.extracting": ("extract",),
        "paramend.merging.folding": ("fold",),
        "paramend.merging.merge": ("merge",),
        "paramend.porting.port": ("port", "port_"),
        "paramend.stacking.stack": ("stack_layers", "unstack_layers"),
        "paramend.tokens.vocabulary": ("vocabulary",),
        "paramend.journal.undo": ("history", "undo"),
    }.items()
    for name in names
}
# Names that are modules of their own, as in `pm.depth.blocks`.
_MODULES = {
    "depth": "paramend.growth.depth",
    "errors": "paramend.errors",
    "init": "paramend.growth.init",
    "resize": "paramend.resize",
    "testing": "paramend.testing",
}
__all__ = sorted([*_LATER, *_MODULES, "__version__"])

if not TYPE_CHECKING:  # or any name at all would do for type checkers
    from paramend import anatomy  # a wing with the name of a function: imported once, it leaves the name

    del anatomy

    def __getattr__(name: str) -> object:
        if name in _LATER:
            found = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
            return found
        if name in _MODULES:
            return importlib.import_module(_MODULES[name])
        if name == "__version__":  # the standard library's reader takes half as long to import as numpy
            return importlib.import_module("importlib.metadata").version("paramend")
        raise AttributeError(f"module 'paramend' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
