"""Ray Tune's names: each change of one is noticed, and each is in the checklist."""

from dataclasses import replace

import pytest
from conftest import ROOT

from orchestrator.base.exits import JobError
from orchestrator.base.ray_internals import SUPPORTED_RAY, require
from orchestrator.search.ray_tune_internals import INTERNALS


@pytest.mark.parametrize("entry", INTERNALS, ids=lambda entry: entry.name)
def test_a_changed_name_is_named(entry):
    changed = [replace(entry, name=entry.name + "_gone")]
    if entry.parameters is not None:
        changed.append(replace(entry, parameters=(*entry.parameters, "more")))
    changed += [replace(entry, attributes=(attribute + "_gone",)) for attribute in entry.attributes]
    for each in changed:
        with pytest.raises(JobError, match="differs: ") as error:
            require(SUPPORTED_RAY, [each])
        assert entry.name in str(error.value)


def test_every_name_is_in_the_checklist():
    listed = (ROOT / "docs" / "upgrading-ray.md").read_text()
    for entry in INTERNALS:
        for name in (entry.name, *entry.attributes):
            assert f"`{name}`" in listed, name
