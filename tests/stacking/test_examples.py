"""Examples of what the functions of stacking/ give."""

from paramend.stacking.stack import _one_number


def test_one_number():
    assert (_one_number("stage_<s>/block_<n+1>"), _one_number("layers_")) == ("stage_*/block_<n>", "layers_<n>")
