"""Which cases of a parameter a contributor waits for, and which only the whole suite runs."""

import pytest


def slow_except(kept, cases):
    """The cases as parameters with an id: those that are not named in `kept` are marked as slow.

    A case is a name, or a tuple that begins with one.
    """
    names = [case[0] if isinstance(case, tuple) else case for case in cases]
    assert set(kept) <= set(names), f"{sorted(set(kept) - set(names))} are no cases"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name,
            marks=() if name in kept else pytest.mark.slow,
        )
        for name, case in zip(names, cases, strict=True)
    ]
