"""Which calls of two models belong together."""

from collections.abc import Collection, Sequence

import numpy as np

from paramend.porting.recorder import Call
from paramend.porting.values import Values

# Words in the names of classes that frameworks give to layers of one kind.
_WORDS = {
    "transpose": "conv transpose", "deconv": "conv transpose", "conv": "conv", "patchembed": "conv",
    "batchnorm": "batch norm", "layernorm": "layer norm", "rmsnorm": "rms norm", "groupnorm": "group norm",
    "attention": "attention", "embed": "embedding", "lstm": "recurrent", "gru": "recurrent", "rnn": "recurrent",
    "linear": "dense", "dense": "dense", "einsum": "dense",
}  # fmt: skip


def family(kind: str) -> str:
    """What kind of layer a class is, by its name.

    >>> family("Conv2d"), family("LinearGeneral"), family("Block")
    ('conv', 'dense', 'block')
    """
    name = kind.lower()
    return next((family for word, family in _WORDS.items() if word in name), name)


def paired(
    target: Sequence[Call], source: Sequence[Call], pairs: Collection[tuple[str, str]] | None = None
) -> list[tuple[int, int]]:
    """The numbers of calls of two models that belong together, in the order of both. Without the `pairs` of paths of
    modules they are found: of one kind or with equal values, in outputs of one size."""
    known = None if pairs is None else set(pairs)
    ours, theirs = ([_print(call.outputs[0]) for call in calls] for calls in (target, source))

    def score(i: int, j: int) -> int:
        if not target[i].path and not source[j].path:
            return 8  # the models themselves
        if known is not None:
            return int((target[i].path, source[j].path) in known)
        (size, total), (other_size, other) = ours[i], theirs[j]
        if size != other_size:
            return 0
        alike = 4 * (family(target[i].kind) == family(source[j].kind))
        equal = 2 * (abs(total - other) <= 1e-9 * max(total, other))
        return (alike + equal) and alike + equal + (target[i].composite == source[j].composite)

    # The best common subsequence, from the ends.
    best = [[0] * (len(source) + 1) for _ in range(len(target) + 1)]
    scores = [[score(i, j) for j in range(len(source))] for i in range(len(target))]
    for i in range(len(target) - 1, -1, -1):
        for j in range(len(source) - 1, -1, -1):
            taken = scores[i][j] and scores[i][j] + best[i + 1][j + 1]
            best[i][j] = max(best[i + 1][j], best[i][j + 1], taken)
    found, i, j = [], 0, 0
    while i < len(target) and j < len(source):
        if scores[i][j] and best[i][j] == scores[i][j] + best[i + 1][j + 1]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return found


def _print(output: Values) -> tuple[int, float]:
    """What stays when axes change places: how many values there are, and their sum without signs."""
    return output.size, float(np.abs(output).sum())
