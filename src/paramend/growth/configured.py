"""Models with a configuration, whose leaves and configuration change together: checkpoints, transformers modules."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paramend.anatomy.documents import document_of
from paramend.anatomy.quantization import FILES
from paramend.anatomy.sections import enter
from paramend.arrays.registry import backend, backend_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.call import Call
from paramend.edits.memory import editable
from paramend.errors import Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.leaves.leaves import Group
from paramend.reports import wording
from paramend.trees.lookup import is_torch_module

# Name of a file beside the weights, what it holds → what it holds then.
Change = Callable[[str, dict[str, Any]], dict[str, Any]]


class Configured:
    """A model, as its leaves and what its configuration says."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.on_disk, self._module = isinstance(model, Checkpoint), is_torch_module(model)
        own: Any = getattr(model, "config", None)
        if self._module and not hasattr(own, "to_dict"):
            raise Unsupported(f"{wording.described(model)} has no configuration, which would change with its leaves")
        # Its leaves as they are stored; of a module, those of its state dict.
        self.leaves = editable(model.state_dict() if self._module else model, raw=True)
        document = document_of(model)
        self.config: dict[str, Any] = own.to_dict() if self._module else document.values if document else {}

    def edited(self, calls: Mapping[int, Call]) -> "Configured":
        new = copy.copy(self)
        new.leaves = editable(self.leaves.edited(calls), raw=True)
        return new

    def remade(self, groups: Sequence[Group], change: Change, kind: str = "") -> tuple[Any, list[str]]:
        """The model with groups of leaves replaced, as they are stored, and what is to be said of its configuration,
        which changes too; a module may become one of another class of transformers, by its name (`kind`)."""
        if self._module:
            return self._rebuilt(groups, change, kind)
        tree: Any = self.leaves.regrouped(groups) if groups else self.leaves
        if not self.on_disk:
            return tree if groups else self.model, []
        said: list[str] = []
        for name, _ in FILES:
            document = document_of(self.model, name)
            new = document.holding(change(name, document.values)) if document is not None and document.text else None
            if new is None or document is None or new.text == document.text:
                continue
            if skipped := new.skipped(self.model.path):
                said.append(skipped)
            else:
                tree = tree.planned(tree.plan.beside(new))
                said += map(str, new.changes)
        return tree.as_stored(self.model.raw), said

    def _rebuilt(self, groups: Sequence[Group], change: Change, kind: str) -> tuple[Any, list[str]]:
        """A module of the new configuration with the new leaves. Those that stay share memory with the old one."""
        old, module = self.config, self.model
        new = change(CONFIG, copy.deepcopy(old))
        state = self.leaves.regrouped(groups) if groups else dict(module.state_dict())
        cls: Any = type(module)
        config = copy.deepcopy(module.config)
        if kind:
            import transformers  # the module is one of its own

            cls = getattr(transformers, kind, None)
            if cls is None:
                raise Unsupported(f"transformers has no class {kind}", hint="model.save_pretrained(path)")
            config = cls.config_class.from_dict(new)
            for name in ("_attn_implementation", "_experts_implementation"):
                setattr(config, name, getattr(module.config, name, None))
        else:
            enter(config, old, new)
        made = blank(cls, config)
        made.load_state_dict(state, assign=True)
        if hasattr(made, "tie_weights"):
            made.tie_weights()
        _alike(made, module)
        said = [f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]
        return made, said


def blank(cls: Any, config: Any) -> Any:
    """A module of a class whose leaves are about to be replaced; the global generator is as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        return cls(config)


def _alike(made: Any, module: Any) -> None:
    """Make a new module train, differentiate, generate and hold what is in no state dict as the old one does."""
    made.train(module.training)
    if getattr(module, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(module.generation_config)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    for name, parameter in made.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    kept, buffers = set(made.state_dict()), dict(module.named_buffers())
    for name, buffer in list(made.named_buffers()):
        old = buffers.get(name)
        if name not in kept and old is not None and old.shape == buffer.shape:
            above, _, last = name.rpartition(".")
            made.get_submodule(above)._buffers[last] = old.clone()


def copied(value: Any) -> Any:
    """A copy of an array, so that two leaves are not one; an origin as it is."""
    return value if backend_of(type(value)) is None else backend(value).like(value, value)
