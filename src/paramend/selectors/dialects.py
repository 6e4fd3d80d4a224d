"""Dialects: paths and patterns as other tools write them: read where they are clear, else with what to write."""

import re
from collections.abc import Sequence

from paramend.errors import SelectorError
from paramend.leaves.leaves import Index
from paramend.leaves.paths import labels, write_path
from paramend.reports import wording
from paramend.selectors.grammar import Number, Piece
from paramend.selectors.patterns import Pattern, parse

_KEYSTR = re.compile(r"""\[(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|([0-9]+))\]|\.([^\W0-9]\w*)""")


def from_keystr(text: str) -> str | None:
    """A path as `jax.tree_util.keystr` writes it, as a selector; None for any other text.

    >>> from_keystr("['params']['Dense_0']['kernel']"), from_keystr("[0].mu['a/b']"), from_keystr("layers[0].w")
    ('params/Dense_0/kernel', '0/mu/a/b', None)
    """
    if "['" not in text and '["' not in text and not re.match(r"\.[^\W0-9]", text):
        return None
    keys: list[str] = []
    end = 0
    for found in _KEYSTR.finditer(text):
        if found.start() != end:
            return None
        end = found.end()
        single, double, number, name = found.groups()
        quoted = single if single is not None else double
        keys.append(re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else number or name)
    if end != len(text):
        return None
    if len(keys) > 1 and text.endswith("].value"):  # what JAX shows of a box, and paths here do not
        keys.pop()
    return from_keys(keys)


def from_keys(keys: Sequence[object]) -> str:
    """Keys one by one, as `flax.traverse_util.flatten_dict` has them, as a selector.

    >>> from_keys(("params", "mlp/~/linear", "w*", 0))
    'params/mlp/~/linear/w\\\\*/0'
    """
    return write_path([label for key in keys for label in labels(key)])


def keys_in(what: object) -> tuple[str | int, ...] | None:
    """The keys of a path that is given as a tuple of them, also of JAX's; None for anything else.

    >>> keys_in(("params", "kernel")), keys_in(("a", True)), keys_in(["a"])
    (('params', 'kernel'), None, None)
    """
    if not isinstance(what, tuple) or not what:
        return None
    keys = [_key(each) for each in what]
    return None if None in keys else tuple(key for key in keys if key is not None)


def _key(entry: object) -> str | int | None:
    if type(entry).__module__.startswith(("jax.", "jaxlib.")):
        entry = next((getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name)), None)
    return entry if isinstance(entry, str | int) and not isinstance(entry, bool) else None


_REGEX = re.compile(r"(?:^|/)\.[*+]|\.[*+](?=[^./*+])|\\[dwsDWSb.]|^\^|\$$|\([^)]*\|[^)]*\)|\[\^|\)\?|\[[a-z]-[a-z]")


def advice(text: str, index: Index | None = None) -> str:
    """What to write instead of text in another dialect; "" if it is none, or finds nothing in the index that is given.

    >>> advice("a/Dense_[0-2]/w"), advice("~a/b"), advice("a | b"), advice(r".*\\.kernel")
    ('"a/Dense_[0:3]/w"', '~pm.sel("a/b")', 'pm.sel("a") | pm.sel("b")', "re.compile('.*\\\\\\\\.kernel')")
    """
    ranged = re.sub(r"\[([^\[\]]*)\]", _ranges, re.sub(r"\{([0-9]+)\.\.([0-9]+)\}", r"[\1-\2]", text))
    if ranged != text and _finds(ranged, index):
        return f'"{ranged}"'
    if _REGEX.search(text):
        found = _regex(text, index)
        if found:
            return found
    for operator in "|&":
        parts = [part.strip() for part in re.split(rf"{re.escape(operator)}+", text)]
        if len(parts) > 1 and all(part and _finds(part, index) for part in parts):
            return f" {operator} ".join(f'pm.sel("{part}")' for part in parts)
    parts = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text)]
    if len(parts) > 1 and all(part and _finds(part, index) for part in parts):
        return "[" + ", ".join(f'"{part}"' for part in parts) + "]"
    negated = re.fullmatch(r"(?:~|!|not\s+)\s*(.+)", text)
    if negated and _finds(negated[1], index):
        return f'~pm.sel("{negated[1]}")'
    single = re.sub(r"(?<!\\)\?", "*", text)
    return f'"{single}"' if single != text and index is not None and _finds(single, index) else ""


def captures(text: str) -> Pattern:
    """The pattern of a selector; `SelectorError`, with what to write instead if it is in another dialect."""
    try:
        pattern = parse(text)
    except SelectorError as error:
        better = advice(text)
        if not better:
            raise
        message = error.args[0].partition("\n\n")[0]
        raise SelectorError(message, text=text, span=error.span, hint=better) from None
    for segment in pattern.segments:
        for atom in segment.atoms if isinstance(segment, Piece) else ():
            if isinstance(atom, Number) and (atom.factor, atom.shift) != (1, 0):
                raise SelectorError(
                    f"{atom} is arithmetic, and a selector only captures",
                    text=text,
                    span=(text.find("<"), text.find(">") + 1),
                    hint=f"<{atom.name}> here, and {atom} in the target of a rename",
                )
    return pattern


def _ranges(found: "re.Match[str]") -> str:
    """`[0-2]` as `[0:3]`, `[0,2-3]` as `[0,2,3]`."""
    items = found[1].split(",")
    spans = [re.fullmatch(r"\s*([0-9]{1,6})\s*-\s*([0-9]{1,6})\s*", item) for item in items]
    if len(items) == 1 and spans[0]:
        return f"[{int(spans[0][1])}:{int(spans[0][2]) + 1}]"
    out: list[str] = []
    for item, span in zip(items, spans, strict=True):
        numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
        out += [*map(str, numbers)] if span and 0 < len(numbers) <= 100 else [item]
    return f"[{','.join(out)}]"


def _finds(text: str, index: Index | None) -> bool:
    try:
        pattern = parse(text)
        return index is None or bool(pattern.find(index.names))
    except (SelectorError, LookupError):
        return False


def _regex(text: str, index: Index | None) -> str:
    """The text as a regular expression, over whole paths if that finds anything, else anywhere in them."""
    for source in (text, f".*{text}", f"{text}.*", f".*{text}.*"):
        try:
            expression = re.compile(source)
        except re.error:
            return ""
        hits = () if index is None else [n for n in index.numbers if expression.fullmatch(index.path(n))]
        if index is None or hits:
            count = f" ({wording.plural(len(hits), 'leaf', 'leaves')})" if hits else ""
            return f"re.compile({source!r}){count}"
    return ""
