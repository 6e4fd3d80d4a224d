"""Objects in a pickle whose classes are not known here: they are carried unread, and nothing of them runs."""

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from functools import partial
from pathlib import Path
from typing import Any

from paramend.errors import BadCheckpoint
from paramend.formats.torch.pickles import Flaw, Foreign, Name

# Modules of the standard library whose classes hold data. The rest of it (os, subprocess, functools ...) is code.
# fmt: off
_DATA = frozenset({
    "argparse", "array", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "ipaddress", "pathlib", "random", "re", "string", "time", "types", "uuid", "zoneinfo",
})
_BUILTINS = frozenset({
    "object", "list", "dict", "tuple", "frozenset", "range", "slice", "int", "float", "bool", "str", "complex", "bytes",
    "set",
})
# fmt: on
_CODE = frozenset(sys.stdlib_module_names) | {"commands", "distutils", "imp", "pipes", "popen2"}
# Tensors that are a part of others, by the name of their class, and how to save them whole.
_PARTS = {"DTensor": "one part of a tensor that is spread over devices", "ShardedTensor": "one shard of a tensor"}
_WHOLE = (
    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)), saved on rank 0"
)


def foreign(module: str, name: str) -> Name:
    """The name of a class or function that is not known, for a `Foreign` in place of what it makes; `Flaw` for code."""
    old = {"builtins": "__builtin__"}.get(module, module)  # protocol 2 has the names of Python 2
    module, name = NAME_MAPPING.get((old, name), (IMPORT_MAPPING.get(old, module), name))
    text, top = f"{module[:100]}.{name[:100]}", module.partition(".")[0]
    if name in _PARTS:
        raise Flaw(f"it holds {text}, {_PARTS[name]}", hint=_WHOLE)
    known = name in _BUILTINS if top == "builtins" else top in _DATA or top not in _CODE
    if not known or "." in name or not module:
        hint = "ask for the weights alone: torch.save(model.state_dict(), path)"
        raise Flaw(f"{text} is not among the names allowed in a checkpoint", hint=hint)
    # A defaultdict is the dict that its entries are then put into.
    return Name(text, (lambda *factory: {}) if text == "collections.defaultdict" else partial(Foreign, text))


def check_whole(structure: Any, path: Path) -> None:
    """Raise `BadCheckpoint` for a pickled module, or what holds one: its weights are inside an object."""
    new = str(path.with_name(f"{path.stem}-new{path.suffix}"))
    resave = f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), {new!r})"
    resave += "  # runs code of the file: only if you trust it"
    if type(structure) is Foreign and not _is_module(structure):
        hint = resave if structure.text.startswith("torch.") else "torch.save(model.state_dict(), path)"
        raise BadCheckpoint(f"{path}: it is a pickled {structure.text}, not a dict of tensors", hint=hint)
    rest, seen = [structure], set()
    while rest:
        node = rest.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if type(node) is Foreign:
            if _is_module(node):
                why = f"it holds a whole module, a pickled {node.text}: save model.state_dict()"
                raise BadCheckpoint(f"{path}: {why}", hint=resave)
            rest += node.parts
        elif isinstance(node, dict):
            rest += node.values()
        elif isinstance(node, list | tuple):
            rest += node


def _is_module(node: Foreign) -> bool:
    return any(type(part) is dict and {"_parameters", "_modules"} <= part.keys() for part in node.parts)
