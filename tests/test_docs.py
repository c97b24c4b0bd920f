"""Documents that are made from code are in step with it."""

import importlib.util
import re
import subprocess

from conftest import ROOT


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ledger_in_the_docs_is_the_one_the_code_gives():
    assert "\n".join(benchmark("ledger").table()) in (ROOT / "docs" / "layouts.md").read_text()


def documents():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.split() if (ROOT / name).exists()]


def test_every_link_between_documents_leads_to_a_file():
    found = [
        (path.relative_to(ROOT), link)
        for path in documents()
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text())
        if "://" not in link
    ]
    assert len(found) > 20
    assert [(path, link) for path, link in found if not (ROOT / path.parent / link).exists()] == []


def test_every_file_that_a_document_names_is_there():
    pattern = r"`((?:orchestrator|alexnet|jobs|tests|benchmarks|clusters|docs)/[\w./-]+\.(?:py|md|yaml|json|png))"
    missing = [
        (path.name, name)
        for path in documents()
        if path.name != "CHANGELOG.md"
        for name in re.findall(pattern, path.read_text())
        if not (ROOT / name).exists()
    ]
    assert missing == []
