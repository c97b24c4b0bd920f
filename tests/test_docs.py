"""Documents that are made from code are in step with it."""

import importlib.util

from conftest import ROOT


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ledger_in_the_docs_is_the_one_the_code_gives():
    assert "\n".join(benchmark("ledger").table()) in (ROOT / "docs" / "layouts.md").read_text()
