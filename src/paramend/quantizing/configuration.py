"""The configuration beside a checkpoint, which says what its weights are after they got another code."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from paramend.anatomy.documents import document_of
from paramend.anatomy.quantization import FILES
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.errors import Unsupported
from paramend.leaves.schemes import WEIGHTS
from paramend.quantizing.choice import Seen
from paramend.reports import wording

# Name of a file, what it holds → what it holds then; None if nothing.
Change = Callable[[str, dict[str, Any]], dict[str, Any] | None]


def followed(tree: Checkpoint, change: Change) -> tuple[Checkpoint, tuple[str, ...]]:
    """A checkpoint with other files beside its weights, and what is to be said of them.

    Raises:
        BadCheckpoint: one of them is damaged.
    """
    said: list[str] = []
    for name, _ in FILES:
        document = document_of(tree, name)
        if document is None or not document.text:
            continue
        values = change(name, document.values)
        new = replace(document, text=b"") if values is None else document.holding(values)
        if new.text != document.text:
            tree = tree.planned(tree.plan.beside(new))
            said += [f"{name} goes"] if values is None else [f"{name}: {each}" for each in new.changes]
    return tree, tuple(said)


def modules_of(seen: Seen, numbers: Sequence[int]) -> list[str]:
    """The modules that hold some leaves, each once, as configurations name them."""
    return list(dict.fromkeys(".".join(seen.index.pieces(number)[:-1]) for number in numbers))


def floats_in(seen: Seen, without: Sequence[int] = ()) -> list[str]:
    """The modules with a matrix of floats."""
    index = seen.index
    some = (n for n in index.numbers if n not in seen.groups and n not in without and index.pieces(n)[-1] in WEIGHTS)
    return modules_of(seen, [n for n in some if seen.spec(n).kind == "float" and seen.spec(n).ndim > 1])


def check_modules(seen: Seen, chosen: Sequence[int], kept: Sequence[int]) -> None:
    """Raise if a module has weights of both kinds: a configuration says of a whole module whether it is quantised."""
    both = set(modules_of(seen, chosen)) & set(modules_of(seen, kept))
    if both:
        module = min(both)
        paths = [path for n in kept if (path := seen.index.path(n)) and modules_of(seen, [n]) == [module]]
        raise Unsupported(
            f"a configuration cannot say that a part of {module} is quantised: {wording.listing(paths)} would stay so",
            hint=f'"{module.replace(".", seen.index.separator)}{seen.index.separator}*"',
        )
