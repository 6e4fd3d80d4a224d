"""`pm.tie` and `pm.untie`: the head that is the embedding, or has a weight of its own."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, TypeVar, cast

from paramend.anatomy.documents import document_of
from paramend.anatomy.ties import KEY, KNOWN, saying, tiable
from paramend.arrays.registry import backend
from paramend.checkpoints.anatomy import anatomy, configuration, is_module
from paramend.checkpoints.assemble import origin_of
from paramend.edits.memory import Memory, editable
from paramend.edits.quantized import check_whole
from paramend.errors import BadArgument, NoMatch, SpecMismatch, Unsupported
from paramend.leaves.leaves import Editable, Group, keys_of, separator_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import labels, text_of
from paramend.mapping.report import LayoutReport, Moved
from paramend.piecewise.rows import data

T = TypeVar("T")
Keep = Literal["embedding", "head"]
Path = tuple[str, ...]
Ties = Mapping[Path, Path]  # a weight that is another → that one


def tie(model: T, *, head: str | None = None, keep: Keep | None = None) -> tuple[T, LayoutReport]:
    """The model with the embedding as its head, and a report.

    Files lose the weight of the head; in a torch module both are one parameter then. The configuration follows.

    Args:
        model: an opened checkpoint, of which nothing is written before its `.save(out)`; a module of transformers; or a
            tree of arrays.
        head: the path of the head's weight, where its name is not one of the usual ones.
        keep: whose values stay if they differ.

    Raises:
        NoMatch: there is no embedding of a usual name, or no head.
        SpecMismatch: shapes or dtypes differ; or values, and `keep` is not given.
        Quantized: one of them is a part of a quantised weight.
        Unsupported: the class of the model fixes what it holds; or it is not known what its family ties.

    >>> tree, report = tie({"wte": {"weight": np.ones((3, 2))}, "lm_head": {"weight": np.ones((3, 2))}})
    >>> list(tree), report.rows[0].path
    (['wte'], 'lm_head/weight')
    """
    if keep not in (None, "embedding", "head"):
        raise BadArgument(f'keep={keep!r} is neither "embedding" nor "head"', hint='keep="embedding"')
    work = _Work(model, head)
    pairs = {one: of for one, of in work.pairs.items() if one in work.numbers}
    if not pairs:
        raise NoMatch("there is no head with a weight of its own", hint='head="lm_head.weight", its path')
    for one, of in pairs.items():
        work.check(one, of, keep)
    return cast(T, work.done(pairs, tied=True, last=keep == "head")), work.report("tie", pairs)


def untie(model: T, *, head: str | None = None) -> tuple[T, LayoutReport]:
    """The model with a head whose weight is a copy of the embedding, and a report. The configuration follows.

    All weights that the configuration ties are made, such as the bias of BERT's head: none is drawn anew when the
    model is loaded. A head that is stored all the same keeps its values.

    Args:
        model: as in `tie`.
        head: the path that the head's weight gets, where the family is not known.

    Raises:
        NoMatch: nothing is tied, or it is not known what.
        Quantized, Unsupported: as in `tie`.

    >>> tree, report = untie({"wte": {"weight": np.ones((3, 2))}}, head="lm_head.weight")
    >>> list(tree), report.rows[0].origin
    (['wte', 'lm_head'], 'wte/weight')
    """
    work = _Work(model, head)
    if not work.tied:
        raise NoMatch(
            "no weights are tied, as far as the configuration and the names tell", hint='head="lm_head.weight"'
        )
    pairs = {one: of for one, of in work.tied.items() if one not in work.numbers or work.shared(one, of)}
    return cast(T, work.done(pairs, tied=False)), work.report("untie", pairs)


class _Work:
    """Weights of a model that are one, or may be: `numbers` are those of the leaves by path; `pairs` are path of a
    weight that may be another → that one; `tied` those that are one now, as far as configuration and names tell."""

    def __init__(self, model: Any, head: str | None) -> None:
        self.leaves: Editable = editable(model)
        index, config = self.leaves.index, configuration(self.leaves)
        paths = {number: index.pieces(number) for number in index.numbers}
        self.numbers = {path: number for number, path in paths.items()}
        self.separator = separator_of(index.texts.values())
        kind = config.get("model_type")
        self.pairs, self.tied = tiable(config, paths), dict(anatomy(model).tied)
        if head is not None:
            one = tuple(map(text_of, labels(head)))
            if not any(one):
                raise BadArgument(f"head={head!r} is no path", hint='head="lm_head.weight"')
            if one[-1] == "kernel":
                raise Unsupported(f"{head} would hold the embedding transposed", hint='head="lm_head.weight"')
            self.pairs = self.tied = dict.fromkeys([one], next(iter(self.pairs.values()))) if self.pairs else {}
            if one in self.numbers and self.pairs:
                self._check_specs(one, self.pairs[one])
        elif kind is not None and kind not in KNOWN:
            said = f"it is not known that {KEY} ties the head of a {kind!r} model, and nothing else"
            raise Unsupported(said, hint='head="lm_head.weight", if it does')

    def shared(self, one: Path, of: Path) -> bool:
        """Whether two weights that are stored are one leaf."""
        ties = self.leaves.ties
        return ties.get(self.numbers[one], -1) == ties.get(self.numbers[of], -2)

    def check(self, one: Path, of: Path, keep: Keep | None) -> None:
        """Raise if a weight cannot become another."""
        leaves, (a, b) = self.leaves, (self.numbers[one], self.numbers[of])
        check_whole(leaves, (a, b), "be tied")
        both = self._check_specs(one, of)
        if keep is None and not self.shared(one, of) and self._digest(a) != self._digest(b):
            raise SpecMismatch(f"{both} hold different values", hint='keep="embedding" or keep="head"')

    def _check_specs(self, one: Path, of: Path) -> str:
        """What two weights are; raise if they cannot be one."""
        first, other = (self.leaves.spec(self.numbers[path]) for path in (one, of))
        both = f"{self._text(one)} {first} and {self._text(of)} {other}"
        if first != other:
            raise SpecMismatch(f"{both} cannot be one weight")
        return both

    def _digest(self, number: int) -> bytes:
        found = blake2b()
        for piece in data(origin_of(self.leaves, number)):
            found.update(piece)
        return found.digest()

    def done(self, pairs: Ties, *, tied: bool, last: bool = False) -> Any:
        """The model with each of some weights as another, or as a copy of it, and the configuration that says so. Of
        several that become one, the values of the last count if `last`, else those of the first."""
        groups = {of: [one for one in pairs if pairs[one] == of] for of in pairs.values()}
        if is_module(self.leaves):
            return _module_done(self.leaves, groups, tied, last)
        made = [self._group(of, others, tied, last) for of, others in groups.items()]
        new: Any = self.leaves.regrouped(made) if made else self.leaves
        document = document_of(new)
        if document is not None:
            new = new.planned(new.plan.beside(document.holding(saying(document.values, tied))))
        return new

    def _group(self, of: Path, others: Sequence[Path], tied: bool, last: bool) -> Group:
        first = self.leaves.read(self.numbers[of]) if isinstance(self.leaves, Memory) else None
        shares = first is not None and backend(first).__name__.endswith(".torch")  # type: ignore[attr-defined]
        paths = [of, *(others if shares or not tied else ())]

        def make(stored: Sequence[Any]) -> list[Any]:
            kept = stored[-1 if last else 0]
            copied = tied or isinstance(kept, Origin)
            return [kept, *(kept if copied else backend(kept).get(kept, ...) for _ in paths[1:])]

        there = [self.numbers[path] for path in (of, *others) if path in self.numbers]
        return Group(tuple(there), tuple([(key, None) for key in self._keys(path, of)] for path in paths), make)

    def _keys(self, path: Path, of: Path) -> Path:
        """The keys of a weight: its own, or for a new one as many as another has."""
        index = self.leaves.index
        if path in self.numbers:
            return keys_of(index.paths[self.numbers[path]])
        return path if len(keys_of(index.paths[self.numbers[of]])) > 1 else (self._text(path),)

    def _text(self, path: Path) -> str:
        return self.separator.join(path)

    def report(self, name: str, pairs: Ties) -> LayoutReport:
        """What became of the weights."""
        texts = {self._text(one): (self._text(of), self.leaves.spec(self.numbers[of])) for one, of in pairs.items()}
        rows = tuple(Moved(one, spec, of, (of,)) for one, (of, spec) in texts.items())
        kept = tuple(self._text(path) for path in self.numbers if path not in pairs)
        return LayoutReport(name, rows, kept, (f"{name}d", "kept"))


def _module_done(memory: Any, groups: Mapping[Path, Sequence[Path]], tied: bool, last: bool) -> Any:
    """A torch module, in which unchanged tensors are the same objects."""
    import torch

    new = memory.with_leaves({})
    for of, others in groups.items():
        kept = new.get_parameter(".".join(others[-1] if last else of))
        for path in (of, *others) if tied else others:
            weight = kept if tied else torch.nn.Parameter(kept.detach().clone(), requires_grad=kept.requires_grad)
            setattr(new.get_submodule(".".join(path[:-1])), path[-1], weight)
    config = getattr(new, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if hasattr(part, KEY):
            setattr(part, KEY, tied)
    if hasattr(new, "all_tied_weights_keys"):
        new.all_tied_weights_keys = new.get_expanded_tied_weights_keys(all_submodels=True)
    return new
