"""What notebooks show of selections and reports, and reports as data frames of pandas (the group `far`)."""

import builtins

import numpy as np
import pytest

import paramend as pm
from paramend.errors import MissingExtra

TREE = {"layers": {str(i): {"w&": np.ones((2, 3), "float32")} for i in range(3)}, "head": np.ones(3, "float32")}


def test_a_selection_shows_its_leaves_folded():
    shown = pm.at(TREE, "**")._repr_html_()
    assert "layers/{0..2}/w&amp;" in shown and "3 × float32[2,3]" in shown and "72 B" in shown
    assert 'w&"' not in shown


def test_a_report_without_a_page_shows_its_text(tmp_path):
    path = tmp_path / "m.safetensors"
    pm.save(TREE, path)
    pm.patch(path, lambda model: pm.at(model, "head").zero())
    shown = pm.undo(path)._repr_html_()
    assert shown.startswith("<pre>") and "head" in shown


def test_a_data_frame_needs_pandas(monkeypatch):
    real = builtins.__import__

    def absent(name, *args):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match="pip install pandas"):
        pm.stats(TREE).to_frame()


@pytest.mark.far
def test_reports_as_data_frames():
    frame = pm.stats(TREE).to_frame()
    assert list(frame["path"]) == ["layers/0/w&", "layers/1/w&", "layers/2/w&", "head"]
    assert "part" not in frame and frame.set_index("path").loc["head", "norm"] ** 2 == pytest.approx(3)
    changed = {**TREE, "head": np.zeros(3, "float32")}
    both = pm.diff(TREE, changed).to_frame().groupby("part")["path"].apply(list)
    assert both["changed"] == ["head"] and len(both["identical"]) == 3
    _, report = pm.graft(TREE, changed)
    assert set(report.to_frame()["part"]) == {"copied"}
