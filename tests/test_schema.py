"""The page and the JSON schema of run.json are those of its type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvp.results import ModelRecord
from kvp.schema import OUT, files

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["run-json.md", "run.schema.json"])
def test_the_committed_files_are_those_of_the_type(name):
    assert (ROOT / OUT / name).read_text() == files()[name], "stale: run `python -m kvp.schema`"


def test_the_page_explains_every_field_and_its_unit():
    page = re.sub(" +", " ", files()["run-json.md"])
    assert "| `nll` | nats/token | mean negative log-likelihood of the predicted tokens |" in page
    assert "| `status` | - | how far it is: running, finished, failed |" in page
    assert "| `<name>` | fraction | accuracy or standard error |" in page
    assert "## `dense.evaluation.zero_shot.<name>`" in page
    for field in ModelRecord.model_fields.values():
        assert field.description in page
    assert "| |" not in page
