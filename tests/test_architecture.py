"""Imports run one way, a check fails where one does not, and docs/architecture.md lists every file."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LAYERS, PLAIN, MLFLOW = CONTRACTS
FLOORS = [re.split(r" \| ", floor) for floor in LAYERS["layers"]]  # the highest first
FOLDERS = list(itertools.chain(*FLOORS))

ALLOWED = {
    (folder, other)
    for height, floor in enumerate(FLOORS)
    for folder in floor
    for other in [folder, *itertools.chain(*FLOORS[height + 1 :])]
}
FORBIDDEN = [pair for pair in itertools.product(FOLDERS, FOLDERS) if pair not in ALLOWED]


def module_in(package):
    """Some module of it, the same in every run."""
    folder = ROOT / package.replace(".", "/")
    return f"{package}.{min(file.stem for file in folder.glob('*.py') if file.stem != '__init__')}"


def lint(folder):
    """What lint-imports finds in a copy of the tree; its cache, too, stays out of the checkout."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "500"}
    )  # fmt: skip
    return done.returncode, " ".join(done.stdout.split()), done.stderr


@pytest.fixture
def copy(tmp_path):
    for package in ("alexnet", "orchestrator"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(copy, package, target):
    """A file in `package` that imports `target`, within a function, where it is easily overlooked."""
    name = f"planted_{target.replace('.', '_')}"
    (copy / package.replace(".", "/") / f"{name}.py").write_text(f"def late() -> None:\n    import {target}\n")
    return f"{package}.{name} -> {target} (l.2)"


def test_every_folder_has_its_place_among_the_layers():
    found = {f"orchestrator.{init.parent.name}" for init in (ROOT / "orchestrator").glob("*/__init__.py")}
    assert {*found, "alexnet"} == set(FOLDERS)
    assert not [file.name for file in (ROOT / "orchestrator").glob("*.py") if file.name != "__init__.py"]
    assert set(MLFLOW["source_modules"]) == set(FOLDERS) - {"orchestrator.tracking"}


def test_an_import_that_runs_back_up_is_found_and_both_files_are_named(copy):
    assert len(FORBIDDEN) == len(FOLDERS) * (len(FOLDERS) - 1) // 2 + 1, "base and alexnet know nothing of each other"
    status, found, errors = lint(copy)
    assert status == 0, found + errors
    planted = [plant(copy, low, module_in(high)) for low, high in FORBIDDEN]
    status, found, errors = lint(copy)
    assert status == 1, errors
    assert [line for line in planted if line not in found] == []


def test_what_only_some_folders_may_import_is_found_elsewhere(copy):
    outside = [("alexnet", "ray"), ("alexnet", "mlflow"), ("alexnet", "orchestrator")]
    outside += [(folder, "mlflow") for folder in FOLDERS if folder not in ("alexnet", "orchestrator.tracking")]
    planted = [plant(copy, folder, target) for folder, target in outside]
    plant(copy, "orchestrator.tracking", "mlflow")
    status, found, errors = lint(copy)
    assert status == 1, errors
    assert [line for line in planted if line not in found] == []
    assert "orchestrator.tracking.planted_mlflow" not in found


def test_the_table_of_the_architecture_has_a_line_for_every_file():
    rows = re.findall(r"^\| *`([\w/]+\.py)` *\|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    files = {
        file.relative_to(ROOT).as_posix()
        for folder in ("orchestrator", "alexnet", "jobs")
        for file in (ROOT / folder).rglob("*.py")
    }
    assert sorted(rows) == sorted(set(rows)), "a file has one line"
    assert sorted(set(rows) - files) == [], "no such file"
    assert sorted(file for file in files - set(rows) if not file.endswith("__init__.py")) == [], "not in the table"
