"""docs/configuration.md is what the schema says, and the schema says what every key is."""

from pathlib import Path

from pydantic import BaseModel

from mskd.config.phases import OBJECTIVES
from mskd.config.reference import TABLES, page
from mskd.config.schema import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
OF_A_TABLE = {"chain", "data", "phases", "train", "evaluation", "run", "objective"}  # described by their own heading


def test_the_page_is_that_of_the_schema():
    again = "python -m mskd.config.reference > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == page(), f"run: {again}"


def test_every_key_says_what_it_is():
    tables: list[type[BaseModel]] = [Config, *(model for *_, model in TABLES), *OBJECTIVES.values()]
    silent = [
        f"{table.__name__}.{name}"
        for table in tables
        for name, field in table.model_fields.items()
        if not field.description and name not in OF_A_TABLE
    ]
    assert silent == []
