"""Numbers of a model that the steps of a layout name, such as its heads."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from paramend.anatomy.documents import document_of
from paramend.errors import BadArgument
from paramend.formats.jsontext import CONFIG
from paramend.leaves.leaves import Editable
from paramend.reports import wording

# What a configuration that lacks a number means by that.
_DERIVED: Mapping[str, Callable[[Callable[[str], int]], int]] = {
    "num_key_value_heads": lambda number: number("num_attention_heads"),
    "head_dim": lambda number: number("hidden_size") // number("num_attention_heads"),
}
# What those mean that are nowhere: a vocabulary of unknown size, and one that is not padded, as by Megatron-Bridge.
_DEFAULTS = {"vocab_size": 0, "make_vocab_size_divisible_by": 1, "tensor_model_parallel_size": 1}
_SOURCES = {"num_key_value_heads": ("num_attention_heads",), "head_dim": ("hidden_size", "num_attention_heads")}


@dataclass(frozen=True)
class Numbers:
    """The numbers of a model, of which some are `named` by a layout: those given, else those of its configuration."""

    leaves: Editable
    given: Mapping[str, int]
    named: Iterable[str]

    def __post_init__(self) -> None:
        known = sorted({*self.named, *(name for one in self.named for name in _SOURCES.get(one, ()))})
        for name, value in self.given.items():
            if name not in known:
                near = wording.closest(name, known, limit=1)
                said = f"the numbers of this layout: {', '.join(known)}" if known else "this layout takes no numbers"
                raise BadArgument(f"no step names {name!r}", hint=near[0] if near else said)
            _check(name, value)

    def __call__(self, name: str) -> int:
        """A number; `BadArgument` if it is neither given nor in the configuration, or it is no number."""
        if name in self.given:
            return self.given[name]
        for config in (self._config, self._config.get("text_config")):
            if isinstance(config, Mapping) and config.get(name) is not None:
                return _check(name, config[name])
        if name in _DERIVED and self._config:
            return _DERIVED[name](self)
        if name in _DEFAULTS:
            return _DEFAULTS[name]
        where = f"{CONFIG} has no {name}" if self._config else f"there is no {CONFIG} that says {name}"
        raise BadArgument(where, hint=f"pass it: {name}=8")

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return read_config(self.leaves)


def _check(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise BadArgument(f"{name} is {value!r}, and not a whole number above 0", hint=f"{name}=8")
    return value


def read_config(leaves: Editable) -> Mapping[str, Any]:
    """The `config.json` beside an opened checkpoint, {} for other trees and where there is none."""
    found = document_of(leaves)
    return {} if found is None else found.values
