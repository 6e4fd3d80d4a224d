"""States of torch optimizers carried over to other parameters and groups, or from files."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from paramend.errors import BadArgument
from paramend.grafting.report import GraftReport
from paramend.grafting.states import graft_torch as states
from paramend.grafting.states.refusals import refuse_left, refuse_misfits
from paramend.reports import wording


def carry_optimizer_(
    optimizer: Any, old: Any, modules: tuple[Any, Any], names: Sequence[str] | None, unused: str
) -> GraftReport:
    """The report, after the optimizer has taken over what the earlier one has for the parameters of both."""
    states.refuse_kinds(optimizer, old)
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
            report.unused.append(states.state_row((name,), entry, value, "its parameter is not in this optimizer"))
    refuse_left(report, unused)
    of_all = isinstance(optimizer, torch.optim.LBFGS)  # one state for all parameters together
    if not of_all:
        _refuse_misfits(new, keys, found)
    elif found[0] is not None and all(found) and len(found) == len(known):
        optimizer.state[new[0][0]] = _copied(found[0].state, new[0][0], new[0][1])
    did = "copied by order" if keys == list(range(len(keys))) else "copied"
    for key, (parameter, group), source in zip(_written(keys), new, found, strict=True):
        if source is None or not source.state:
            report.fresh.append(
                states.state_row((key,), "", parameter, "starts in its first step (nothing in the earlier state)")
            )
        elif not of_all:
            optimizer.state[parameter] = made = _copied(source.state, parameter, group)
            for entry, value in _tensors(made):
                report.copied.append(states.state_row((key,), entry, value, did, (key,), value))
    states.steps_as_tensors(optimizer)
    for group in optimizer.param_groups:
        ids = {id(p) for p in group["params"]}
        sources = {id(s.group): s.group for (p, _), s in zip(new, found, strict=True) if s is not None and id(p) in ids}
        if len(sources) == 1:  # with parameters from several groups it is ambiguous whose rate to take
            (source_group,) = sources.values()
            group |= {
                k: v for k, v in source_group.items() if k not in states.OWN and (k in group or k == "initial_lr")
            }
    return report


def _tensors(state: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, value in state.items() if (tensor := states.as_tensor(name, value)) is not None]


def _written(keys: Iterable[Any]) -> list[str]:
    """What parameters are called in a report: their names, or else their numbers."""
    return [key if isinstance(key, str) else f"#{number}" for number, key in enumerate(keys)]


def _matched(
    optimizer: Any, old: Any, modules: tuple[Any, Any], names: Sequence[str] | None
) -> tuple[list[Any], dict[Any, states.Entry]]:
    """Keys that identify the parameters of both: those of the new ones in order, and the old ones by key."""
    new, earlier = states.entries(optimizer), states.entries(old)
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


def _refuse_misfits(new: list[tuple[torch.Tensor, Any]], keys: list[Any], found: list[states.Entry | None]) -> None:
    wrong = []
    for number, ((parameter, _), key, source) in enumerate(zip(new, keys, found, strict=True)):
        for name, value in source.state.items() if source is not None else ():
            if isinstance(value, torch.Tensor) and not _fits(name, value, tuple(parameter.shape)):
                who = key if isinstance(key, str) else f"parameter {number}"
                wrong.append(f"{name} of {who} is {list(value.shape)}, and the parameter {list(parameter.shape)}")
    hint = 'take the entries of these parameters out of the earlier state: state_dict["state"].pop(number)'
    refuse_misfits(wrong, hint)


def _fits(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> bool:
    single = value.numel() == 1 and (name in states.SCALARS or not shape)
    return single or tuple(value.shape) == states.shape_for(name, shape)


def _copied(state: Mapping[str, Any], parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().to(states.device_for(name, parameter, group), copy=True)
        if isinstance(value, torch.Tensor)
        else copy(value)
        for name, value in state.items()
    }
