"""The tables of the reference and of other pages are true. `python docs/making/doctables.py` writes them."""

import pytest
from doctables import DOCS, TABLES, fresh


@pytest.mark.parametrize("page", sorted({page for page, _ in TABLES.values()}))
def test_the_tables_of_a_page_are_true(page):
    assert (DOCS / page).read_text() == fresh(page), "run `python docs/making/doctables.py`"
