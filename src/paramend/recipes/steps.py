"""Steps: the data of a recipe, checked as far as possible without a tree. All problems are found at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from paramend.edits.arguments import shown
from paramend.edits.ops import OPS
from paramend.errors import ParamendError, Problem, Quantized, printable_lines
from paramend.leaves.nested import is_deep
from paramend.recipes.keys import CONDITIONS, SELECTOR, Key
from paramend.recipes.text import MAX_LEVELS, MAX_PROBLEMS, below, write_scalar
from paramend.recipes.verbs import CODE, VERBS, Verb
from paramend.reports import wording
from paramend.selectors.renames import captures, rename
from paramend.selectors.selector import Selector, sel

T = TypeVar("T")

VERSION = 1
_KEYS = ("version", "raw", "steps")


@dataclass(frozen=True, slots=True)
class RecipeStep:
    """One step: a row of the table, its keys with their values read, such as full names of dtypes, and its place."""

    verb: Verb
    given: Mapping[str, Any]
    number: int = 0

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.addressed("at")]

    def addressed(self, key: str) -> list[tuple[str, str]]:
        """The texts of `at` or `except`, each with its address in the step."""
        texts = self.given.get(key, [])
        return [(f"{key}[{n}]", text) for n, text in enumerate(texts)] if isinstance(texts, list) else [(key, texts)]

    def selectors(self) -> list[Selector]:
        return list(map(sel, self.texts))

    def to_dict(self) -> dict[str, Any]:
        if self.verb.short and list(self.given) == ["at"]:
            return {self.verb.name: self.given["at"]}
        return {self.verb.name: dict(self.given)}


class Enough(Exception):
    """There are as many problems as anybody reads."""


class Problems(list[Problem]):
    """Problems, in the order in which they are found. One too many raises `Enough`."""

    def append(self, problem: Problem) -> None:
        if len(self) >= MAX_PROBLEMS:
            raise Enough
        super().append(problem)

    def add(self, address: str, message: str, hint: str = "", code: str = "recipe") -> None:
        self.append(Problem(address, message, hint, code))

    def tried(self, address: str, make: Callable[..., T], *args: Any) -> T | None:
        """The result of a function; None, and a problem, if it raises an error of the library."""
        try:
            return make(*args)
        except ParamendError as error:
            self.append(problem_of(error, address))
            return None


def problem_of(error: ParamendError, address: str) -> Problem:
    """An error as a problem with an address."""
    tail = printable_lines(f"\n\nhint: {error.hint}") if error.hint else ""
    hint = "raw: true beside steps takes leaves as they are stored" if isinstance(error, Quantized) else error.hint
    return Problem(address, str(error).removesuffix(tail), hint, error.code)


def parse_steps(data: Any, problems: Problems) -> tuple[RecipeStep, ...]:
    """The steps of a recipe; what is wrong with it is added to the problems, up to as many as anybody reads.

    >>> problems = Problems()
    >>> parse_steps({"version": 1, "steps": [{"fill": {"at": "w", "valeu": 1}}]}, problems)
    ()
    >>> [problem.address for problem in problems]
    ['$.steps[0].valeu', '$.steps[0]']
    """
    try:
        return _parse(data, problems)
    except Enough:
        return ()


def _parse(data: Any, problems: Problems) -> tuple[RecipeStep, ...]:
    if is_deep(data, MAX_LEVELS):
        problems.add("$", "maps and lists are nested too deeply")
        return ()
    if not isinstance(data, Mapping):
        problems.add(
            "$",
            f"a recipe is a map with version and steps, not {_kind(data)}",
            '{version: 1, steps: [zero: "**/bias"]}',
        )
        return ()
    for key in data:
        if key not in _KEYS:
            problems.add(below("$", str(key)), f"there is no key {key!r}", _near(str(key), _KEYS))
    if type(data.get("raw", False)) is not bool:
        problems.add("$.raw", f"raw is true or false, not {_kind(data['raw'])}", "raw: true")
    if "version" not in data:
        problems.add("$", "there is no version", f"version: {VERSION}")
    elif type(data["version"]) is not int or data["version"] != VERSION:
        problems.add("$.version", f"{shown(data['version'])} is not a known version", f"version: {VERSION}")
    if "steps" not in data:
        problems.add("$", "there are no steps", 'steps: [zero: "**/bias"]')
        return ()
    steps = data["steps"]
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        empty = steps is None or (isinstance(steps, Sequence) and not steps)
        message = "there are no steps" if empty else f"steps is a list, not {_kind(steps)}"
        problems.add("$.steps", message, "begin each step with a dash, even a single one" if not empty else "")
        return ()
    parsed = [_step(step, f"$.steps[{n}]", problems) for n, step in enumerate(steps)]
    return tuple(replace(step, number=n) for n, step in enumerate(parsed) if step is not None)


def _step(data: Any, address: str, problems: Problems) -> RecipeStep | None:
    if not isinstance(data, Mapping) or not data:
        hint = f"{data}: ..." if isinstance(data, str) and data in VERBS else 'zero: "**/bias"'
        problems.add(address, f"a step is a map with one key, its verb, not {_kind(data)}", hint)
        return None
    verbs = [key for key in data if key in VERBS or key in CODE]
    if len(data) > 1 and verbs:
        lost = [key for key in data if key not in verbs]
        hint = f"indent {wording.listing(lost)} below {verbs[0]}:" if lost else "make each a step of its own"
        problems.add(address, f"a step has one key, and this has {wording.listing(list(map(str, data)))}", hint)
        return None
    for name in data:
        if name in CODE:
            hint = f"in Python: pm.at(tree, selector).{name}(...); here: {', '.join(VERBS)}"
            problems.add(below(address, name), f"{name} takes code, and nothing in a recipe runs code", hint)
        elif name not in VERBS:
            also = [op.name for op in OPS.values() if name in op.words]
            problems.add(
                below(address, str(name)), f"there is no step {name!r}", also[0] if also else _near(name, VERBS)
            )
    if not verbs or verbs[0] in CODE:
        return None
    verb = VERBS[verbs[0]]
    return _given(verb, data[verb.name], address, problems)


def _given(verb: Verb, body: Any, address: str, problems: Problems) -> RecipeStep | None:
    """The step, if nothing is wrong with the body below its verb."""
    before = len(problems)
    if verb.short and body is not None and not isinstance(body, Mapping):
        body = {"at": body}
    if not isinstance(body, Mapping):
        said = f"{verb.name} takes a map of {wording.listing([key.name for key in verb.keys])}"
        problems.add(address, f"{said}, not {_kind(body)}", _example(verb))
        return None
    keys = {key.name: key for key in verb.keys}
    for name in body:
        if name not in keys:
            problems.add(
                below(address, str(name)), f"{verb.name} has no key {name!r}", _near(str(name), keys) or _example(verb)
            )
    given = {name: _read(key, body[name], below(address, name), problems) for name, key in keys.items() if name in body}
    missing = [key.name for key in verb.keys if key.required and key.name not in body]
    if missing:
        problems.add(address, f"{verb.name} needs {' and '.join(missing)}", _example(verb))
    alternatives = [name for name in verb.one_of if name in body]
    if verb.one_of and len(alternatives) != 1:
        needed = " or ".join(verb.one_of)
        problems.add(address, f"{verb.name} needs {needed}{', not both' if alternatives else ''}", _example(verb))
    if verb.any_of and not any(name in body for name in verb.any_of):
        problems.add(address, f"{verb.name} needs {' or '.join(verb.any_of)}", _example(verb))
    if "leaf" in body and "from" not in body:
        problems.add(below(address, "leaf"), "leaf names a leaf of another file, and there is no from", _example(verb))
    if len(problems) > before:
        return None
    step = RecipeStep(verb, given)
    target = given.get("to") or given.get("leaf", "")
    if "to" in given or captures(target):
        for text in step.texts:
            problems.tried(below(address, "to" if "to" in given else "leaf"), rename, text, target)
    elif target:
        problems.tried(below(address, "leaf"), sel, target)
    return step if len(problems) == before else None


def _read(key: Key, data: Any, address: str, problems: Problems) -> Any:
    if key.value is SELECTOR and isinstance(data, list | tuple):
        if not data:
            hint = '"**" matches every leaf' if key.required else f"leave {key.name} out"
            problems.add(address, "an empty list matches nothing", hint)
        return [_read(key, text, below(address, n), problems) for n, text in enumerate(data)]
    if key.name == "where":
        return _conditions(data, address, problems)
    found = problems.tried(address, key.value.read, data)
    if key.value is SELECTOR and found:
        problems.tried(address, sel, found)
    return found


def _conditions(data: Any, address: str, problems: Problems) -> Any:
    known = {key.name: key for key in CONDITIONS}
    if not isinstance(data, Mapping) or not data:
        problems.add(address, f"where is a map of {', '.join(known)}, not {_kind(data)}", "where: {dtype: float}")
        return None
    for name in data:
        if name not in known:
            hint = _near(str(name), known) or ", ".join(known)
            problems.add(below(address, str(name)), f"there is no condition {name!r}", hint)
    return {name: _read(key, data[name], below(address, name), problems) for name, key in known.items() if name in data}


def _near(word: Any, known: Iterable[str]) -> str:
    near = wording.closest(str(word), known, limit=1)
    return f"did you mean {near[0]}?" if near else ""


def _example(verb: Verb) -> str:
    ((name, body),) = verb.example.items()
    return f"{name}: {write_scalar(body)}"


def _kind(data: Any) -> str:
    if data is None:
        return "nothing"
    if isinstance(data, Mapping):
        return "a map" if data else "an empty map"
    if isinstance(data, list | tuple):
        return "a list"
    return f"the text {shown(data)}" if isinstance(data, str) else shown(data)
