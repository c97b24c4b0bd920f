"""docs/scale.md has the tables that benchmarks/scale.py makes of benchmarks/results/scale.json."""

import json

import pytest
import scale
from conftest import ROOT

PAGE = (ROOT / "docs" / "scale.md").read_text()
RESULT = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())


def test_what_was_predicted_and_measured_is_in_the_docs():
    assert "\n".join(scale.held_against(RESULT["parts"], RESULT["real"])) in PAGE


@pytest.mark.parametrize("machine", ["p4d", "this"])
def test_the_simulated_tables_are_in_the_docs(machine):
    rows = [scale.Row(**row) for row in RESULT["simulated"][machine]["rows"]]
    for lines in (scale.table(rows), scale.paying_table(rows), scale.breaks_table(rows)):
        assert "\n".join(lines) in PAGE


@pytest.mark.parametrize("shards", ["paper", "paper_remote"])
def test_the_papers_run_is_in_the_docs(shards):
    assert "\n".join(scale.paper_table(RESULT["simulated"]["p4d"][shards])) in PAGE
