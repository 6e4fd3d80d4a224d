"""Detection: the rule of `pm.resize` that the name and the shapes of a leaf suggest."""

import re
from collections.abc import Sequence

from paramend.errors import SpecMismatch
from paramend.leaves.specs import Spec
from paramend.resize.fits import Shape, grids
from paramend.resize.rules import Resize, channels, patches, positions, vocabulary

# Patterns in leaf names. Position tables of Hugging Face, timm, CLIP, GPT-2, Flax and big_vision; embeddings and
# output layers of language models; first layers of vision transformers.
_NAMES = {
    kind: re.compile(rf"(^|/)({names})(/|$)", re.IGNORECASE)
    for kind, names in {
        "positions": r"pos_?emb\w*|\w*posembed\w*|\w*position(al)?_?emb\w*|\w*pos_emb\w*|wpe|embed_positions"
        r"|\w*position_bias_table",
        "vocabulary": r"embed_tokens|tok_embeddings|token_emb\w*|word_emb\w*|embed_(in|out)|wte|lm_head|shared"
        r"|embed_\d+|embed\w*/embedding",
        "patches": r"\w*patch_?emb\w*|conv_proj|patchify|embedding/kernel",
    }.items()
}
_PLAIN = (positions(), positions(method="linear"), vocabulary(), patches(), channels())
_BOLD = (vocabulary(shrink=True), patches(flat="chw"), patches(flat="hwc"))


def detected(path: Sequence[str], old: Shape, new: Shape) -> Resize:
    """The rule that the name and the shapes of a leaf suggest; `SpecMismatch` if it is ambiguous, or there is none."""
    kinds = _kinds(path)
    plain = [rule for rule in _PLAIN if rule.kind in kinds]
    rules = [rule for rule in plain if _fits(rule, path, old, new) and not _doubtful(rule, path, old, new)]
    if not rules and _first_layer(path, old, new):
        return channels()
    if len(rules) == 1:
        return rules[0]
    if not kinds:
        raise SpecMismatch("its name does not say what it is; say so with resize={selector: rule of pm.resize}")
    plain[0].planned(old, new, path)  # raises an error that says why
    could = " or ".join(repr(rule) for rule in plain if _fits(rule, path, old, new))
    raise SpecMismatch(f"its name says {' or '.join(kinds)}, and resize={{selector: rule}} should say which: {could}")


def ways(path: Sequence[str], old: Spec, new: Spec, asked: Resize | None = None) -> tuple[Resize, ...]:
    """The rules that would work, of the kind that was asked for or that the name suggests."""
    kinds = [asked.kind] if asked else _kinds(path)
    tries = [*_PLAIN, *_BOLD]
    if asked and asked.kind == "vocabulary":
        tries.insert(0, Resize("vocabulary", {**asked.options, "shrink": True}))
    if (old.kind, new.kind) != ("float", "float"):
        return ()
    tries = [rule for rule in tries if rule.kind in kinds and rule != asked]
    return tuple(
        rule
        for rule in tries
        if _fits(rule, path, old.shape, new.shape) and not _wide(rule, path, old.shape, new.shape)
    )


def _kinds(path: Sequence[str]) -> list[str]:
    """The kinds that a name suggests; positions come first, as in embeddings/position_embeddings."""
    found = [kind for kind, names in _NAMES.items() if names.search("/".join(path))]
    return found[:1] if "positions" in found else found


def _fits(rule: Resize, path: Sequence[str], old: Shape, new: Shape) -> bool:
    try:
        rule.planned(old, new, path)
    except SpecMismatch:
        return False
    return True


def _doubtful(rule: Resize, path: Sequence[str], old: Shape, new: Shape) -> bool:
    """Whether the leaf may well be something that the rule is not for. A table of positions (n, d) or (1, n, d) is
    certainly a grid only if a prefix token makes both counts squares, and certainly a sequence only if none does and
    there is no leading axis, which tables for images have."""
    if rule.kind != "positions":
        return _wide(rule, path, old, new)
    is_grid = rule.options["method"] == "bicubic"
    axes = [axis for axis, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]
    if len(axes) > 1 or sum(size > 1 for size in old) > 2:
        return not is_grid
    try:
        prefix, *_ = grids(old[axes[0]], new[axes[0]])
    except SpecMismatch:
        return is_grid or len(old) > 2
    return not (is_grid and prefix)


def _wide(rule: Resize, path: Sequence[str], old: Shape, new: Shape) -> bool:
    """Whether the width of a vocabulary differs, not its count: kernels are (width, count), others the reverse."""
    along = -1 if path and path[-1] == "kernel" else 0
    return rule.kind == "vocabulary" and old[along] == new[along]


def _first_layer(path: Sequence[str], old: Shape, new: Shape) -> bool:
    """Whether this is a convolution over three colours in which only the colours differ."""
    axis = {"weight": 1, "kernel": 2}.get(path[-1] if path else "")
    return axis is not None and len(old) == 4 and old[axis] == 3 and _fits(channels(), path, old, new)
