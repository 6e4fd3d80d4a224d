"""Examples of what the functions of cli/ give."""

import tempfile
from pathlib import Path

from paramend.cli.fates import Filled, Outputs


def test_outputs():
    folder = Path(tempfile.mkdtemp())
    outputs = Outputs([folder / "a", folder / "b"])
    assert outputs() == "nothing was written"
    (folder / "a").write_text("new")
    assert outputs().replace(str(folder), "...") == "1 of 2 outputs had been written: .../a; not .../b"


def test_filled():
    assert Filled(Path("no/such/folder"))() == "nothing was written"
