"""What verbs that end in `_` return: None for edits, a report for surgeries, and never what they were given."""

import inspect
import json

import numpy as np
import torch

import paramend as pm
from paramend.edits.ops import OPS
from paramend.reports.report import Report


def net():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


GIVEN = {
    "set": {"value": torch.ones(2, 2)},
    "apply": {"fn": torch.abs},
    "project_out": {"direction": torch.ones(2), "axis": 0},
}  # what only code can say


def arguments(op):
    return GIVEN.get(op.name) or {
        name: each.typed(each.example) for name, each in zip(op.parameters, op.takes, strict=True)
    }


def test_edits_return_none():
    twins = {f"{op.name}_": op for op in OPS.values() if op.keeps_spec}
    assert set(twins) == {name for name in dir(pm.Selection) if name.endswith("_") and not name.startswith("_")}
    model = net()
    for verb, op in twins.items():
        assert getattr(pm.at(model, "0.weight"), verb)(**arguments(op)) is None
    assert pm.Recipe([{"zero": "**"}]).apply_(model) is None
    assert pm.init.zero_(model) is None
    assert not any(parameter.any() for parameter in model.parameters())


SURGERIES = {
    "deepen_": lambda model: pm.deepen_(model, order=[0, 1, 1]),
    "widen_": lambda model: pm.widen_(model, features={"0": 4}),
    "freeze_": lambda model: pm.freeze_(model, "0.*"),
    "graft_": lambda model: pm.graft_(model, net()),
    "graft_optimizer_": lambda model: pm.graft_optimizer_(stepped(model), stepped(model)),
    "port_": lambda model: pm.port_(model, net()),
    "unfreeze_": lambda model: pm.unfreeze_(model, "0.*"),
}
EARLIER = {"init_zero_"}  # names that go on returning what they did


def test_surgeries_return_their_report():
    assert set(SURGERIES) | EARLIER == {name for name in pm.__all__ if name.endswith("_") and not name.startswith("_")}
    for surgery in SURGERIES.values():
        report = surgery(net())
        assert isinstance(report, Report)
        assert report.headline() in str(report)
        assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_the_report_of_a_freeze_is_the_list_of_paths():
    model = net()
    report = pm.freeze_(model, "0.*")
    assert report == ["0.weight", "0.bias"] == list(report)
    assert report[0] in dict(model.named_parameters())
    assert (report.did, [row.spec.shape for row in report.rows]) == ("frozen", [(2, 2), (2,)])
    assert str(report).startswith("frozen: 2 leaves")
    assert pm.unfreeze_(model, report) == report
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sliced = pm.freeze_(model, pm.sel("0.weight")[:1], optimizer=optimizer)
    assert sliced == ["0.weight"]
    assert sliced.headline() == "frozen: [:1] of 1 leaf"


def test_both_sides_and_the_selector_have_one_name_each():
    from paramend import testing

    for verb in (pm.diff, pm.verify, testing.assert_identical, testing.assert_only_changed):
        names = list(inspect.signature(verb).parameters)
        assert names[:2] == ["before", "after"]
        assert "only" in names or verb is testing.assert_identical
    old, new = {"a": np.ones(2), "b": np.ones(1)}, {"a": np.zeros(2), "b": np.ones(1)}
    assert (
        pm.diff(old, new, "b", only="a").to_dict() == pm.diff(after=new, before=old, selector="b", only="a").to_dict()
    )
    assert pm.verify(before=old, after=new, only="a") == ["a"]
    testing.assert_only_changed(old, new, "a")
    testing.assert_only_changed(before=old, after=new, only="a")
    testing.assert_identical(old, new, "b")
