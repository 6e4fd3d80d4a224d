"""`pm.vocabulary`: the tokens of a model, kept in part, extended, padded, or taken from another model."""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast

import numpy as np

from paramend.anatomy.documents import Document, document_of
from paramend.anatomy.sections import enter
from paramend.anatomy.tokens import New, named_ids, names_in, renumbered, sizes_of
from paramend.arrays.registry import to_numpy
from paramend.checkpoints.anatomy import is_module
from paramend.checkpoints.assemble import exchanged, origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.memory import Memory, editable
from paramend.edits.moves import whole_numbers
from paramend.errors import BadArgument, OutOfRange, SpecMismatch, Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.leaves.leaves import Editable
from paramend.leaves.specs import AnyArray, Spec
from paramend.pages.page import Column, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, Section
from paramend.tokens.rows import Mix, Rows, arranged
from paramend.tokens.tables import Table, tables_of
from paramend.tokens.tokenizer import Tokenizer, tokenizer_of

T = TypeVar("T")
Init: TypeAlias = Literal["mean", "subwords", "zero"] | AnyArray


@dataclass(frozen=True, repr=False)
class VocabularyReport(Paged):
    """What became of a vocabulary.

    Attributes:
        did: "kept", "extended", "padded" or "transplanted".
        tables: path of a table → its shape and dtype before and after.
        size: how many rows they had and have.
        ids: old number of a token → its new one, of all that stay.
        tokens: token → its number, of those that are new.
        unasked: the numbers, as they were, of tokens that stay unasked: special ones, and those that others need.
        files: what changes in the files beside the weights.
    """

    did: str
    tables: dict[str, tuple[Spec, Spec]]
    size: tuple[int, int]
    ids: dict[int, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    unasked: tuple[int, ...] = ()
    files: tuple[str, ...] = ()

    def headline(self) -> str:
        """The numbers of rows and tokens, and the files that follow."""
        before, after = self.size
        said = f"vocabulary {self.did}: {before:,} rows -> {after:,} in {wording.plural(len(self.tables), 'table')}"
        said += f", {wording.plural(len(self.tokens), 'new token')}" if self.tokens else ""
        said += f", {wording.plural(len(self.unasked), 'token')} kept unasked" if self.unasked else ""
        return "\n".join((said, *self.files))

    def sections(self) -> list[Section]:
        """The tables."""
        lines = [Line((path,), (str(old), f"-> {new}"), new.size) for path, (old, new) in self.tables.items()]
        return [Section("tables", lines)]

    def page(self) -> Page:
        """The tables as a map."""
        before, after = ([str(pair[side]) for pair in self.tables.values()] for side in (0, 1))
        columns = [Column("before", before, "text"), Column("spec", after, "text")]
        sizes = [new.size for _, new in self.tables.values()]
        return Page("vocabulary", self.headline(), [*self.tables], sizes, columns)


def vocabulary(model: T, *, tables: Mapping[str, int] | None = None) -> "Vocabulary[T]":
    """The tokens of a model, and the leaves that have a row for each of them.

    Its verbs `keep`, `extend`, `pad` and `transplant` change all of these together: embeddings, heads, biases, tables
    for the layers, `config.json`, `generation_config.json` and the files of the tokenizer.

    Args:
        model: a checkpoint from `pm.open`, of which nothing is read before it is saved; a module of transformers; or a
            tree in memory: dicts, a state dict, another module.
        tables: selector → the axis of the tokens, of all these leaves, where names and shapes do not tell.

    Raises:
        BadArgument: no leaf is known to be a table of tokens, several have different lengths, or one may be another.
        Quantized: a table is quantised.
        Unsupported: the model drafts for another one, in whose vocabulary its own is numbered.
        BadCheckpoint: a configuration is damaged.

    >>> model = {"embed_tokens": {"weight": np.eye(4)}, "lm_head": {"weight": np.eye(4)}}
    >>> words = vocabulary(model)
    >>> words
    <vocabulary: 4 rows in 2 tables>
    >>> tree, report = words.keep([3, 0])
    >>> tree["lm_head"]["weight"].tolist(), report.ids
    ([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], {0: 0, 3: 1})
    """
    return Vocabulary(model, tables)


class Vocabulary(Generic[T]):
    """The tokens of a model: see `pm.vocabulary`, which makes it.

    Attributes:
        tables: the leaves that have a row for each token.
        size: how many rows they have.
    """

    def __init__(self, model: T, tables: Mapping[str, int] | None = None) -> None:
        self._leaves: Editable = editable(model)
        if is_module(self._leaves):
            found = [*documents_of(model)]
        else:
            found = [document for name in FILES if (document := document_of(self._leaves, name)) is not None]
        self._configs: list[Document] = found
        sizes = [size for each in self._configs for size in sizes_of(each.values)]
        self.tables: Sequence[Table] = tables_of(self._leaves, sizes, tables)
        self.size: int = max(table.rows for table in self.tables)
        self._sizes = {table.rows for table in self.tables}

    def __repr__(self) -> str:
        return f"<vocabulary: {self.size:,} rows in {len(self.tables)} tables>"

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer beside the weights; None if there is none."""
        return tokenizer_of(self._leaves)

    def keep(self, ids: Iterable[int] | Mapping[int, int]) -> tuple[T, VocabularyReport]:
        """The model with some of its tokens, in their order, numbered anew.

        Other tokens stay, too, where texts of those that are asked for could not be cut as before: special ones and
        those that configurations name, single bytes, and the parts that a token is merged of. Rows without a token
        stay. Rows are copied, bit for bit.

        Args:
            ids: the numbers of the tokens; or number → how often it is met, of which those above 0 are kept.

        Returns:
            The model, of the same type, and the report, whose `ids` are old number → new number.

        Raises:
            OutOfRange: there is no such token.
            BadArgument: `ids` are not whole numbers, or nothing would be left.
            Unsupported: the tokenizer is there in a format of its own alone.
        """
        if isinstance(ids, Mapping):
            ids = [number for number, count in ids.items() if count]
        asked = set(whole_numbers(ids, "ids", "pm.vocabulary(model).keep([0, 1, 2])"))
        tokens = self.tokenizer
        end = max(self.size, tokens.size if tokens else 0)
        outside = [number for number in asked if not 0 <= number < end]
        if outside:
            raise OutOfRange(f"there is no token {outside[0]} among {end:,}")
        kept = asked.union(*(named_ids(each.values, self._sizes) for each in self._configs)) & set(range(end))
        kept = kept if tokens is None else tokens.closed(kept)
        if not kept:
            raise BadArgument("no token would be left", hint="pm.vocabulary(model).keep([0, 1, 2])")
        rest = set() if tokens is None else set(range(end)) - set(tokens.ids.values())
        order = sorted(kept | rest)
        new = {old: place for place, old in enumerate(order)}
        files = tokens.renumbered(new) if tokens is not None and len(order) < end else []
        unasked = tuple(sorted(kept - asked - rest))
        return self._made("kept", lambda rows: Rows(order[: bisect_left(order, rows)]), files, new, unasked=unasked)

    def extend(self, tokens: Sequence[str], init: Init = "mean") -> tuple[T, VocabularyReport]:
        """The model with more tokens, at the next numbers of its tokenizer: in rows without a token, then in new ones.

        Args:
            tokens: the tokens, as texts.
            init: their rows: "mean" of all others, so that n new tokens have at most a share of n in all of them,
                whatever the logits are; "subwords", the mean of those of the tokens that the text consisted of so far;
                "zero"; or an array (tokens, width) for tables of that width, beside which others get the mean.

        Raises:
            BadArgument: the tokenizer has such a token, or they are not texts.
            SpecMismatch: no table has rows like those of the array.
            Unsupported: as in `keep`; or "subwords" is asked for, and there is no `tokenizer.json`.
            MissingExtra: "subwords" is asked for, and the package tokenizers is not installed.

        >>> model = {"embed_tokens": {"weight": np.array([[1.0], [3.0]])}}
        >>> tree, report = vocabulary(model).extend(["<a>"])
        >>> tree["embed_tokens"]["weight"].tolist(), report.tokens
        ([[1.0], [3.0], [2.0]], {'<a>': 2})
        """
        tokens = [tokens] if isinstance(tokens, str) else list(tokens)
        if not tokens or not all(isinstance(each, str) and each for each in tokens):
            raise BadArgument(f"{tokens!r:.60} are not texts", hint='pm.vocabulary(model).extend(["<a>", "<b>"])')
        known = self.tokenizer
        twice = [each for each in tokens if tokens.count(each) > 1 or (known is not None and each in known.ids)]
        if twice:
            raise BadArgument(f"{twice[0]!r} is a token already, or is given twice")
        start = self.size if known is None else known.size
        mixes, end = self._mixes(init, tokens), start + len(tokens)

        def order(rows: int) -> Rows:
            if rows < min(start, self.size):  # of a table that lacks the last tokens
                return Rows(range(rows))
            old = min(start, rows)
            fresh = [*[None] * (start - old), *mixes]
            return Rows([*range(old), *range(rows, rows + len(fresh)), *range(end, rows)], fresh, old)

        files = [] if known is None else known.extended(tokens)
        ids = {each: start + at for at, each in enumerate(tokens)}
        return self._made("extended", order, files, tokens=ids)

    def pad(self, multiple: int) -> tuple[T, VocabularyReport]:
        """The model with rows up to a multiple of a number, as servers that share tables among devices need.

        A new row is the mean of the others, so that n new ones have at most a share of n in all of them, whatever the
        logits are: a row of zeros may have nearly all.

        Args:
            multiple: the number.

        Raises:
            BadArgument: it is not a whole number above 0.

        >>> vocabulary({"wte": {"weight": np.array([[1.0], [3.0]])}}).pad(4)[0]["wte"]["weight"].tolist()
        [[1.0], [3.0], [2.0], [2.0]]
        """
        (number,) = whole_numbers([multiple], "multiple", ".pad(64)")
        if number < 1:
            raise BadArgument(f"multiple={number} is not above 0", hint=".pad(64)")

        def order(rows: int) -> Rows:
            more = -rows % number if rows == self.size else 0  # what a shorter table lacks, it lacks for a reason
            return Rows(range(rows + more), [None] * more, rows)

        return self._made("padded", order)

    def transplant(
        self, donor: object, init: Literal["mean", "subwords", "zero"] = "mean"
    ) -> tuple[T, VocabularyReport]:
        """The model with the tokens of another one, and its tokenizer.

        Tokens that both have, as they stand in texts, and those that both configurations name by one key, such as
        `eos_token_id`, get the rows that they had, bit for bit.

        Args:
            donor: the other model: a checkpoint from `pm.open`.
            init: the rows of other tokens, as in `extend`.

        Returns:
            The model, and the report, whose `ids` are old number → number in the donor, and `tokens` those without
            a row before.

        Raises:
            BadArgument: as in `pm.vocabulary`, for the donor.
            Unsupported: one of them has no `tokenizer.json`, or the configuration names a token that the donor lacks.
        """
        other: Vocabulary[object] = Vocabulary(donor)
        mine, theirs = self.tokenizer, other.tokenizer
        if mine is None or theirs is None:
            raise Unsupported("tokens are taken from one checkpoint to another, each with a tokenizer.json beside it")
        by_text = {text: number for number, text in mine.texts.items()}
        texts = theirs.texts
        known = {number: by_text[text] for number, text in texts.items() if text in by_text}
        new = {old: number for number, old in known.items()}
        given = {each.name: names_in(each.values) for each in other._configs}
        lacking: set[int] = set()
        for each in self._configs:
            ours, its = names_in(each.values), given.get(each.name, {})
            for key in (key for key in ours if type(ours[key]) is type(its.get(key)) is int):
                known.setdefault(its[key], ours[key])
                new.setdefault(ours[key], its[key])
            lacking |= named_ids({key: value for key, value in each.values.items() if key not in its}, self._sizes)
        lacking = lacking & set(range(self.size)) - {*new}
        if lacking:
            raise Unsupported(f"the configuration names the token {min(lacking)}, and the donor has none like it")
        words = {number: text.decode(errors="replace") for number, text in texts.items() if number not in known}
        fresh = dict(zip(words, self._mixes(init, [*words.values()]), strict=True))

        def order(rows: int) -> Rows:
            places, mixes = [], list[Mix]()
            for number in range(other.size):
                old = known.get(number, rows)
                places.append(old if old < rows else rows + len(mixes))
                mixes += [fresh.get(number)] if old >= rows else []
            return Rows(places, mixes, min(mine.size, rows))

        tokens = {token: number for token, number in theirs.ids.items() if number in words}
        return self._made("transplanted", order, theirs.instead_of(mine), new, given, tokens=tokens)

    def _mixes(self, init: Init, texts: Sequence[str]) -> list[Mix]:
        """What the rows of new tokens are made of."""
        if not isinstance(init, str):
            rows = np.asarray(to_numpy(init))
            shapes = {self._leaves.spec(each.number).size // max(each.rows, 1) for each in self.tables}
            if rows.ndim != 2 or len(rows) != len(texts) or rows.shape[1] not in shapes:
                wide = wording.listing(sorted(map(str, shapes)))
                raise SpecMismatch(f"init has the shape {list(rows.shape)}, for {len(texts)} rows of {wide}")
            return list(rows)
        if init not in ("mean", "subwords", "zero"):
            raise BadArgument(f"init={init!r} is not one of mean, subwords, zero, or an array")
        if init != "subwords":
            return [None if init == "mean" else ((), ())] * len(texts)
        if self.tokenizer is None:
            raise Unsupported("there is no tokenizer that would cut a token into others", hint='init="mean"')
        return [(ids, [1 / len(ids)] * len(ids)) if ids else None for ids in self.tokenizer.cut(texts)]

    def _made(
        self,
        did: str,
        order: Callable[[int], Rows],
        files: Sequence[Document] = (),
        new: dict[int, int] | None = None,
        given: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        **told: Any,
    ) -> tuple[T, VocabularyReport]:
        """The model with other rows in its tables, with the files that follow, and the report; `new` says which number
        each token gets, if not all keep theirs, `given` what configurations hold then in any case."""

        def moved(token: int) -> int | None:
            return token if new is None else new.get(token, None if token < self.size else token)

        orders = {table.rows: order(table.rows) for table in self.tables}
        size = {rows: len(each.places) for rows, each in orders.items()}
        changed: dict[int, Callable[[Any], Any]] = {}
        tables: dict[str, tuple[Spec, Spec]] = {}
        for number, axis, rows in self.tables:
            old = self._leaves.spec(number)
            shape = (*old.shape[:axis], size[rows], *old.shape[axis + 1 :])
            tables[self._leaves.index.path(number)] = old, Spec(shape, old.dtype)
            if not orders[rows].trivial(rows):
                changed[number] = partial(arranged, axis=axis, rows=orders[rows])
        texts: list[Document] = []
        for each in self._configs:
            text = each.holding(renumbered(each.values, moved, size) | dict(given.get(each.name, {})))
            texts += [text] if text.text != each.text else []
        texts += files
        said = [f"{text.name}: {change}" for text in texts for change in text.changes]
        said += [f"{text.name} goes" for text in texts if not text.text]
        if self._configs and size[self.size] != self.size and self.size not in sizes_of(self._configs[0].values):
            said.append(f"{CONFIG} is not changed: nothing in it counts {self.size:,} rows")
        report = VocabularyReport(did, tables, (self.size, size[self.size]), new or {}, files=tuple(said), **told)
        made = _replaced(self._leaves, changed, texts)
        if is_module(self._leaves) and changed:
            follow(made, texts, size, moved)
        return cast(T, made), report


def _replaced(leaves: Editable, rows: Mapping[int, Callable[[Any], Any]], texts: Sequence[Document]) -> Any:
    """A tree with other arrays in the places of some; of a checkpoint, with other files beside its weights."""
    if not isinstance(leaves, Checkpoint):
        memory = cast(Memory, leaves)
        first = {memory.ties.get(number, number): make for number, make in rows.items()}
        return memory.with_leaves({number: make(memory.values[number]) for number, make in first.items()})
    made = leaves
    if rows:
        made = exchanged(leaves, {number: make(origin_of(leaves, number)) for number, make in rows.items()})
    for text in texts:
        made = made.planned(made.plan.beside(text))
    return made


# The file of a configuration → the attribute that holds it.
FILES = {"config.json": "config", "generation_config.json": "generation_config"}
_SIZES = ("num_embeddings", "out_features", "vocab_size")


def documents_of(module: Any) -> Iterator[Document]:
    """The configurations of a module, as the files that they are saved as."""
    for name, attribute in FILES.items():
        own: Any = getattr(module, attribute, None)
        if hasattr(own, "to_json_string"):
            text = own.to_json_string(use_diff=False).encode()
            yield Document(Path(name), text, text)


def follow(module: Any, texts: Sequence[Document], sizes: Mapping[int, int], new: New) -> None:
    """Make the modules of a module, and its configurations, those of tables with other `sizes`, old → new."""
    for text in texts:
        enter(getattr(module, FILES[text.name]), json.loads(text.before), text.values)
    for each in module.modules():
        weight = getattr(each, "weight", None)
        sized = {name: sizes.get(getattr(each, name, -1)) for name in _SIZES}
        found = {name: size for name, size in sized.items() if size and (weight is None or len(weight) == size)}
        for name, size in found.items():
            setattr(each, name, size)
        if found and getattr(each, "padding_idx", None) is not None:
            each.padding_idx = new(each.padding_idx)
