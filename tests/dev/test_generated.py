"""What `make docs` writes from code into the pages is there."""

import pytest

from dev import metrics_table, options_table, settings_table
from dev.generated import filled


def test_the_table_of_settings_is_the_models():
    page = settings_table.PAGE.read_text(encoding="utf-8")

    assert filled(page, settings_table.parts()) == page, "run `make docs`"


def test_the_tables_of_metrics_are_those_of_the_code():
    page = metrics_table.PAGE.read_text(encoding="utf-8")

    assert filled(page, metrics_table.parts()) == page, "run `make docs`"


@pytest.mark.parametrize(("page", "parts"), options_table.parts().items(), ids=lambda value: getattr(value, "name", ""))
def test_the_tables_of_options_are_those_of_the_commands(page, parts):
    text = page.read_text(encoding="utf-8")

    assert filled(text, parts) == text, "run `make docs`"
