"""Grafts of the states of torch optimizers: the moments of a parameter follow it, by a report or by its name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch

from paramend.errors import BadArgument, GraftRefused, Unsupported
from paramend.grafting.report import GraftReport, GraftRow, Link, Links, Path, refuse_left, refuse_misfits
from paramend.leaves.specs import Spec, dtype_name
from paramend.reports import wording
from paramend.trees.tree import Tree

_ANEW = "leave out this call: the first step starts anew"

# Entries that are one number for a whole parameter.
SCALARS = frozenset({"step", "eta", "mu", "mu_product"})

# The initial values of entries that do not start at zero.
_STARTS: dict[str, Callable[[torch.Tensor, Mapping[str, Any]], Any]] = {
    "step_size": lambda parameter, group: group["lr"],  # Rprop
    "sum": lambda parameter, group: group.get("initial_accumulator_value", 0.0),  # Adagrad
    "ax": lambda parameter, group: parameter.detach(),  # ASGD: the mean of the parameter over the steps
}

# Entries of factored moments, by the axis from the end that has length 1.
_FACTORED = {"row_var": -1, "col_var": -2}

# Entries that a hyperparameter requires: without them the next step would fail.
_ASKED = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}

# How a step is carried out: the new optimizer keeps its own settings.
OWN = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})

# The same, with hyperparameters that are common to all optimizers, that came with later versions of torch, or that
# schedulers add.
_EVERYWHERE = OWN | {"lr", "initial_lr", "maximize", "decoupled_weight_decay"}
_EVERYWHERE |= {"max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


def graft_optimizer_(
    optimizer: Any, old: Any, report: GraftReport, target: Any, source: Any, unused: str
) -> GraftReport:
    """The report, after the optimizer has taken over what the earlier one has for the copied parameters."""
    _refuse_lbfgs(optimizer, old)
    refuse_kinds(optimizer, old)
    links = Links(report)
    states = _states(old, source, links)
    done = GraftReport()
    new: dict[torch.Tensor, dict[str, Any]] = {}
    homeless: dict[str, None] = {}
    problems: list[str] = []
    carried: set[Path] = set()
    for parameter, group, path in _named(optimizer, target, links):
        link = links.targets[path]
        state = states.get(link.source) if link.source is not None else None
        if not state or link.source is None:
            did = f"as its parameter: {link.did}" if link.source is None else "nothing in the earlier state"
            done.fresh.append(state_row(path, "", parameter, f"starts in its first step ({did})"))
            continue
        carried.add(link.source)
        made: dict[str, Any] = {}
        complete = _complete(state, group)
        for name in state.keys() - complete.keys():
            homeless[name] = None
            done.unused.append(state_row(link.source, name, state[name], "no place for it in the new state"))
        for name, value in complete.items():
            why, made[name] = _carried(name, value, parameter, group, link)
            if why:
                problems.append(f"{name} of {'.'.join(path)} {why}")
            elif (here := as_tensor(name, made[name])) is not None:
                old_value = as_tensor(name, value)
                corner = old_value is not None and here.shape != old_value.shape
                rows = done.mismatched if corner else done.copied
                rows.append(state_row(path, name, here, "copied", link.source, old_value))
        new[parameter] = made
    for path, state in states.items():
        for name, value in state.items() if path not in carried else ():
            if isinstance(value, torch.Tensor):
                why = "its parameter goes nowhere, or is not in this optimizer"
                done.unused.append(state_row(path, name, value, why))
    done.refused = bool(problems or (homeless and unused == "error"))
    if done.refused and not problems:
        raise GraftRefused(
            f"the earlier state keeps {wording.listing(list(homeless))}, which have no place here",
            report=done,
            hint='unused="ok" leaves these behind',
        )
    if problems:
        said = wording.listing(problems, 8)
        raise GraftRefused(f"nothing was changed: {said}", report=done, hint=_ANEW)
    for parameter, made in new.items():
        optimizer.state[parameter] = made
    steps_as_tensors(optimizer)
    return done


def _refuse_lbfgs(*optimizers: Any) -> None:
    if any(isinstance(one, torch.optim.LBFGS) for one in optimizers):
        raise Unsupported(
            "L-BFGS keeps one history of curvature for all parameters together: there is none for the copied ones "
            "alone",
            hint=_ANEW,
        )


def refuse_kinds(optimizer: Any, old: Any) -> None:
    """Raise for optimizers whose states mean different things."""
    if not isinstance(old, Mapping):
        if not hasattr(old, "param_groups"):
            raise Unsupported(
                "the earlier state is neither a torch optimizer nor the state dict of one, but "
                f"{wording.described(old)}",
                hint="pm.graft_optimizer_(optimizer, old_optimizer, report)",
            )
        if isinstance(optimizer, type(old)) or isinstance(old, type(optimizer)):
            return
        theirs = f"{type(old).__name__}"
    elif {"state", "param_groups"} <= old.keys():
        mine = set(optimizer.defaults) - _EVERYWHERE
        if all(set(group) - _EVERYWHERE == mine for group in old["param_groups"]):
            return
        settings = sorted(set(old["param_groups"][0]) - _EVERYWHERE) if old["param_groups"] else []
        theirs = f"an optimizer with {wording.listing(settings) or 'no settings'}"
    else:
        raise Unsupported("this dict is not the state dict of an optimizer", hint="old_optimizer.state_dict()")
    why = f"the earlier state is of {theirs}, and this is {type(optimizer).__name__}: their moments differ"
    raise GraftRefused(why, report=GraftReport(refused=True), hint=_ANEW)


def steps_as_tensors(optimizer: Any) -> None:
    """Let the optimizer turn steps that older versions of torch saved as numbers into what it counts in."""
    if any(type(state.get("step")) in (int, float) for state in optimizer.state.values()):
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def as_tensor(name: str, value: Any) -> torch.Tensor | None:
    """An entry of a state as a tensor, if it is one or a counter; else None."""
    if name in SCALARS and type(value) in (int, float):
        return torch.tensor(value)
    return value if isinstance(value, torch.Tensor) else None


class Entry(NamedTuple):
    """A parameter of an optimizer, or its number in a state dict, and what the optimizer has for it."""

    parameter: Any
    name: str | None
    group: dict[str, Any]
    state: Mapping[str, Any]


def entries(optimizer: Any) -> list[Entry]:
    """The parameters of an optimizer or of the state dict of one, in their order."""
    is_dict = isinstance(optimizer, Mapping)
    groups = optimizer["param_groups"] if is_dict else optimizer.param_groups
    states = optimizer["state"] if is_dict else optimizer.state
    return [
        Entry(parameter, name, group, states.get(parameter, {}))
        for group in groups
        for parameter, name in zip(
            group["params"], group.get("param_names") or [None] * len(group["params"]), strict=True
        )
    ]


def _named(optimizer: Any, module: Any, links: Links) -> list[tuple[torch.Tensor, dict[str, Any], Path]]:
    """The parameters of the new optimizer, with their groups and the paths that the report knows them by."""
    paths = _paths(module)
    every = [(p, group, paths.get(id(p)) or _known(name, links.targets)) for p, name, group, _ in entries(optimizer)]
    found = [(parameter, group, path) for parameter, group, path in every if path in links.targets]
    strange = len(every) - len(found)
    if strange:
        raise BadArgument(
            f"{wording.plural(strange, 'parameter')} of this {type(optimizer).__name__} are not in the report",
            hint="pm.graft_optimizer_(optimizer, old_optimizer, report, target=module, source=old_module), with an "
            "optimizer of module.parameters()",
        )
    return found


def _states(old: Any, module: Any, links: Links) -> dict[Path, Mapping[str, Any]]:
    """What the earlier optimizer has, by the path of the parameter in the source."""
    is_dict = isinstance(old, Mapping)
    paths = {} if is_dict else _paths(module)
    every = [(paths.get(id(p)) or _known(name, links.sources), state) for p, name, _, state in entries(old)]
    found = {path: state for path, state in every if path is not None and state}
    if not any(path in links.sources for path, _ in every):
        hint = "pm.graft_optimizer_(optimizer, old_optimizer, report, target=module, source=old_module)"
        if is_dict:
            hint = "old_optimizer = type(optimizer)(old_module.parameters()); old_optimizer.load_state_dict(state_dict)"
        raise BadArgument(
            "it is unknown which parameters of the source the earlier state belongs to: it has no names, and none of "
            "its parameters is in the source of the graft",
            hint=hint,
        )
    return found


def _paths(module: Any) -> dict[int, Path]:
    """id of a tensor → its path in a report: the first, if it is shared."""
    if module is None:
        return {}
    tree = Tree(module)
    return {id(tree.values[n]): tree.index.pieces(tree.ties.get(n, n)) for n in reversed(tree.index.numbers)}


def _known(name: str | None, paths: Any) -> Path | None:
    path = tuple(name.split(".")) if name else ()
    return path if path in paths else None


def _complete(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The state with the entries that the new hyperparameters require, and without those that they rule out."""
    made = dict(state)
    for flag, name in _ASKED.items():
        if flag in group and not group[flag]:
            made.pop(name, None)
        elif group.get(flag) and name not in made:
            like = next(value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim)
            made[name] = torch.zeros_like(like)
    if group.get("momentum") and "momentum_buffer" not in made and "square_avg" in made:  # RMSprop
        made["momentum_buffer"] = torch.zeros_like(made["square_avg"])
    return made


def _carried(name: str, value: Any, parameter: torch.Tensor, group: Mapping[str, Any], link: Link) -> tuple[str, Any]:
    """Why an entry cannot be carried, or ""; and the entry for the new parameter, a copy."""
    if not isinstance(value, torch.Tensor):
        return "", list(value) if isinstance(value, list) else value
    device = device_for(name, parameter, group)
    dtype = parameter.dtype if parameter.is_floating_point() and name not in SCALARS else value.dtype
    value = value.detach()
    if name in SCALARS and value.ndim == 0:
        return "", value.to(device, copy=True)
    old_shape = link.source_shape or ()
    if tuple(value.shape) != shape_for(name, old_shape):
        if link.corner:
            return f"is {list(value.shape)} for a parameter {list(old_shape)}: its corner is unknown", None
        return "", value.to(device, dtype, copy=True)
    wanted = shape_for(name, tuple(parameter.shape))
    if wanted == tuple(value.shape):
        made = torch.empty_like(parameter, dtype=dtype, device=device) if wanted == parameter.shape else None
        return "", value.to(device, dtype, copy=True) if made is None else made.copy_(value)
    made = torch.zeros(wanted, dtype=dtype, device=device)
    if name in _STARTS:
        made += _STARTS[name](parameter, group)
    corner = tuple(slice(0, min(both)) for both in zip(wanted, value.shape, strict=True))
    made[corner] = value[corner].to(device, dtype)
    return "", made


def device_for(name: str, parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.device:
    """The device of an entry: that of the parameter; for a step the host, unless the device counts."""
    counted_there = name != "step" or group.get("capturable") or group.get("fused")
    return parameter.device if counted_there else torch.device("cpu")


def shape_for(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an entry for a parameter of this shape."""
    if name in _FACTORED and len(shape) > 1:
        axis = len(shape) + _FACTORED[name]
        return (*shape[:axis], 1, *shape[axis + 1 :])
    return shape


def state_row(
    path: Path, name: str, value: torch.Tensor, did: str, source: Path | None = None, old: torch.Tensor | None = None
) -> GraftRow:
    """The row of an entry of a state."""
    where = ".".join((*path, name) if name else path)
    spec = Spec(tuple(value.shape), dtype_name(value.dtype))
    if source is None or old is None:
        return GraftRow.of(where, spec, did)
    theirs, taken = Spec(tuple(old.shape), dtype_name(old.dtype)), old
    if spec.shape != theirs.shape:
        corner = tuple(min(both) for both in zip(spec.shape, theirs.shape, strict=True))
        did = f"corner [{', '.join(f':{n}' for n in corner)}] copied"
        taken = old[tuple(map(slice, corner))]
    if old.dtype != value.dtype:
        did += f", cast from {theirs.dtype}"
    return GraftRow.of(where, spec, did, ".".join((*source, name)), theirs, taken=taken.numel())


def carry_optimizer_(
    optimizer: Any, old: Any, modules: tuple[Any, Any], names: Sequence[str] | None, unused: str
) -> GraftReport:
    """The report, after the optimizer has taken over what the earlier one has for the parameters of both."""
    refuse_kinds(optimizer, old)
    new = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    keys, known = _matched(optimizer, old, modules, names)
    found = [known.get(key) for key in keys]
    if not any(found):
        raise BadArgument(
            f"the earlier state has nothing for the {wording.plural(len(new), 'parameter')} of this "
            f"{type(optimizer).__name__}",
            hint="leave out this call: the first step makes a fresh state",
        )
    report = GraftReport()
    used = set(keys)
    for name, (key, earlier) in zip(_written(known), known.items(), strict=True):
        for entry, value in _tensors(earlier.state) if key not in used else ():
            report.unused.append(state_row((name,), entry, value, "its parameter is not in this optimizer"))
    refuse_left(report, unused)
    of_all = isinstance(optimizer, torch.optim.LBFGS)  # one state for all parameters together
    if not of_all:
        _refuse_misfits(new, keys, found)
    elif found[0] is not None and all(found) and len(found) == len(known):
        optimizer.state[new[0][0]] = _copied(found[0].state, new[0][0], new[0][1])
    did = "copied by order" if keys == list(range(len(keys))) else "copied"
    for key, (parameter, group), source in zip(_written(keys), new, found, strict=True):
        if source is None or not source.state:
            did_not = "starts in its first step (nothing in the earlier state)"
            report.fresh.append(state_row((key,), "", parameter, did_not))
        elif not of_all:
            optimizer.state[parameter] = made = _copied(source.state, parameter, group)
            for entry, value in _tensors(made):
                report.copied.append(state_row((key,), entry, value, did, (key,), value))
    steps_as_tensors(optimizer)
    for group in optimizer.param_groups:
        ids = {id(p) for p in group["params"]}
        sources = {id(s.group): s.group for (p, _), s in zip(new, found, strict=True) if s is not None and id(p) in ids}
        if len(sources) == 1:  # with parameters from several groups it is ambiguous whose rate to take
            (source_group,) = sources.values()
            group |= {k: v for k, v in source_group.items() if k not in OWN and (k in group or k == "initial_lr")}
    return report


def _tensors(state: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, value in state.items() if (tensor := as_tensor(name, value)) is not None]


def _written(keys: Iterable[Any]) -> list[str]:
    """What parameters are called in a report: their names, or else their numbers."""
    return [key if isinstance(key, str) else f"#{number}" for number, key in enumerate(keys)]


def _matched(
    optimizer: Any, old: Any, modules: tuple[Any, Any], names: Sequence[str] | None
) -> tuple[list[Any], dict[Any, Entry]]:
    """Keys that identify the parameters of both: those of the new ones in order, and the old ones by key."""
    new, earlier = entries(optimizer), entries(old)
    groups = old["param_groups"] if isinstance(old, Mapping) else old.param_groups
    keys: list[Any] = [id(entry.parameter) for entry in new]
    old_keys: list[Any] = [id(entry.parameter) for entry in earlier]
    if isinstance(old, Mapping) or not set(keys) & set(old_keys):
        keys, old_keys = names_of(optimizer.param_groups, modules[0]), list(names or names_of(groups, modules[1]))
        if old_keys and (len(old_keys) != len(earlier) or len(set(old_keys)) != len(old_keys)):
            raise BadArgument(
                f"{wording.plural(len(set(old_keys)), 'name')} for the "
                f"{wording.plural(len(earlier), 'parameter')} of the earlier state",
                hint="names=[name for name, p in model.named_parameters() if p.requires_grad]",
            )
        if not keys or not old_keys:
            _refuse_order(keys, old_keys, optimizer.param_groups, groups)
            keys, old_keys = list(range(len(new))), list(range(len(earlier)))
    return keys, dict(zip(old_keys, earlier, strict=True))


def _refuse_order(keys: list[Any], old_keys: list[Any], groups: Any, old_groups: Any) -> None:
    """Raise unless the parameters can be matched by order, as torch does where nobody has names and groups agree."""
    sizes, old_sizes = ([len(group["params"]) for group in each] for each in (groups, old_groups))
    if keys or old_keys:
        named, nameless = ("this optimizer", "the earlier state") if keys else ("the earlier state", "this optimizer")
        said = f"{named} has names for its parameters and {nameless} has none: it is unknown which is which"
    elif sum(sizes) != sum(old_sizes):
        said = (
            f"the earlier state is of {wording.plural(sum(old_sizes), 'parameter')} and this optimizer has "
            f"{sum(sizes)}: without names it is unknown which is which"
        )
    elif sizes != old_sizes:
        said = (
            f"the earlier state has groups of {wording.listing(list(map(str, old_sizes)))} parameters, and this "
            f"optimizer of {wording.listing(list(map(str, sizes)))}: without names it is unknown which is which"
        )
    else:
        return
    raise BadArgument(
        said,
        hint="pm.graft_optimizer_(optimizer, old, target=model, names=[...]), with the names of the earlier "
        "parameters in their order; torch.optim.AdamW(model.named_parameters()) knows them",
    )


def names_of(groups: Any, module: Any) -> list[Any]:
    """The names of the parameters in groups, if the groups or a module know them; else an empty list."""
    parameters = [p for group in groups for p in group["params"]]
    if parameters and all(isinstance(p, str) for p in parameters):  # as torch.distributed writes state dicts
        return parameters
    if module is not None and not any(isinstance(p, int) for p in parameters):
        names = {id(p): name for name, p in module.named_parameters()}
        return [names.get(id(p), f"#{i}") for i, p in enumerate(parameters)]
    if not all("param_names" in group for group in groups):
        return []
    return [name for group in groups for name in group["param_names"]]


def _refuse_misfits(new: list[tuple[torch.Tensor, Any]], keys: list[Any], found: list[Entry | None]) -> None:
    wrong = []
    for number, ((parameter, _), key, source) in enumerate(zip(new, keys, found, strict=True)):
        for name, value in source.state.items() if source is not None else ():
            if isinstance(value, torch.Tensor) and not _fits(name, value, tuple(parameter.shape)):
                who = key if isinstance(key, str) else f"parameter {number}"
                wrong.append(f"{name} of {who} is {list(value.shape)}, and the parameter {list(parameter.shape)}")
    hint = 'take the entries of these parameters out of the earlier state: state_dict["state"].pop(number)'
    refuse_misfits(wrong, hint)


def _fits(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> bool:
    single = value.numel() == 1 and (name in SCALARS or not shape)
    return single or tuple(value.shape) == shape_for(name, shape)


def _copied(state: Mapping[str, Any], parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().to(device_for(name, parameter, group), copy=True)
        if isinstance(value, torch.Tensor)
        else copy(value)
        for name, value in state.items()
    }
