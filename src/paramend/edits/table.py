"""The table of edits as it is filled: a function without a body becomes a row, its verb, and the twin in place."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, TypeVar

from paramend.edits import hands
from paramend.edits.arguments import REQUANTIZE, Args, Value
from paramend.edits.call import Check, Op, Run
from paramend.leaves.origins.stored import Zeros

S = TypeVar("S")
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])

ROWS: dict[str, Op] = {}


def edit(
    says: str, run: Run, check: Check | None = None, takes: tuple[Value, ...] = (), **how: Any
) -> Callable[[F], F]:
    """A decorator that enters a verb into the table; its arguments are the attributes of `Op`."""

    def entered(verb: F) -> F:
        own = list(signature(verb).parameters.values())[1:]
        given = takes
        if own and own[-1].name == "requantize" and (takes or not own[:-1]):
            given = (*takes, REQUANTIZE)
        optional = {each.name: each.default for each in own if each.default is not each.empty}
        names = tuple(each.name for each in own)
        op = Op(verb.__name__, says, names, run, check, takes=given, optional=optional, **how)
        if given and len(given) != len(names):
            raise TypeError(f"the edit {op.name} has the arguments {names}, and takes= describes {len(given)}")
        ROWS[op.name] = op

        @wraps(verb)
        def made(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            verb(self, *args, **kwargs)  # Python itself reports a missing argument
            return self._edit(op, _checked({**op.optional, **dict(zip(names, args, strict=False)), **kwargs}))

        return made  # type: ignore[return-value]

    return entered


def moving(move: Callable[[Any, Args], Any]) -> Mapping[str, Any]:
    """The attributes of an edit that only moves elements, of an array or of an origin: on disk, bytes are copied."""
    return {
        "run": lambda library, x, args, place: move(x, args),
        "check": lambda spec, args: hands.spec_of(move(Zeros(spec), args)),
        "moves": move,
        "keeps_spec": False,
        "chunks": False,
        "arithmetic": False,
    }


def in_place(verb: Callable[Concatenate[S, P], Any]) -> Callable[Concatenate[S, P], None]:
    """The twin of a verb that changes the leaves in place."""
    op = ROWS[verb.__name__]
    if not op.keeps_spec:
        raise TypeError(f"{op.name} changes specs, and cannot be done in place")

    def made(self: Any, /, *args: Any, **kwargs: Any) -> None:
        verb.__wrapped__(self, *args, **kwargs)  # type: ignore[attr-defined]
        self._edit_(op, _checked({**op.optional, **dict(zip(op.parameters, args, strict=False)), **kwargs}))

    made.__name__, made.__module__ = f"{op.name}_", verb.__module__
    made.__qualname__ = f"{verb.__qualname__}_"
    made.__doc__ = f"`{op.name}` in place: the selected leaves themselves change, and nothing is returned."
    made.__signature__ = signature(verb).replace(return_annotation=None)  # type: ignore[attr-defined]
    return made


def _checked(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments, if `requantize` among them is a rule that there is; an edit of floats does not look at it."""
    if "requantize" in args:
        REQUANTIZE.read(args["requantize"])
    return args
