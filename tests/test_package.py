"""The wheel holds all that its console scripts need: they run outside the clone."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import alexnet
import orchestrator

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = {f"alexnet-{file.stem}": file for file in (ROOT / "jobs").glob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "mlartifacts", "mlflow.db*", "shards")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def run_installed(wheel, tmp_path_factory):
    """Run a console script of the installed wheel, beside the environment's packages, in a folder of its own."""
    target, place = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, capture_output=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}

    def run(name, *args):
        done = subprocess.run(
            [run.bin / name, *args], cwd=place, env=clean | {"PYTHONPATH": str(target)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return done, place

    run.bin = target / "bin"  # joined with an absolute path it is that path
    return run


def test_the_version_is_the_same_everywhere(wheel):
    assert alexnet.__version__ == orchestrator.__version__
    assert wheel.name.startswith(f"alexnet_orchestrator-{alexnet.__version__}-")


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    packages = {
        file.relative_to(ROOT).as_posix()
        for package in ("alexnet", "orchestrator")
        for file in (ROOT / package).rglob("*")
        if file.suffix == ".py" or file.name == "py.typed"
    }
    assert names == packages
    assert {"alexnet/py.typed", "orchestrator/py.typed"} <= names


def test_every_job_is_a_console_script_over_the_same_function():
    assert PROJECT["scripts"] == {name: f"orchestrator.cli.start:{job.stem}" for name, job in SCRIPTS.items()}
    for job in SCRIPTS.values():
        _, _, code = job.read_text().split('"""')
        assert code.split() == [
            *["import", "sys", "from", "orchestrator.cli.start", "import", job.stem],
            *["if", "__name__", "==", '"__main__":', f"sys.exit({job.stem}())"],
        ]


@pytest.mark.slow
def test_torchvision_is_not_needed_to_run():
    assert not [need for need in PROJECT["dependencies"] if need.startswith("torchvision")]
    code = "import sys; sys.modules['torchvision'] = None\nfor name in ('train', 'tune', 'prepare', 'doctor'): "
    code += "__import__('orchestrator.cli.' + name)\nimport orchestrator.train.worker, orchestrator.search.trial"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# argv: the scripts. Each is run in a child, which has of the project only what its script imports
HELP = """
import os, runpy, sys
import matplotlib.figure, numba, pyarrow, torch
for script in sys.argv[1:]:
    sys.stdout.flush()
    if not os.fork():
        sys.argv = [script, "--help"]
        runpy.run_path(script, run_name="__main__")
    status = os.waitstatus_to_exitcode(os.wait()[1])
    print(f"=== {os.path.basename(script)} {status}", flush=True)
"""


@pytest.mark.slow
def test_help_names_commands_as_the_user_started_this_one(run_installed):
    done, _ = run_installed(sys.executable, "-c", HELP, *(run_installed.bin / name for name in sorted(SCRIPTS)))
    assert done.returncode == 0, done.stderr
    *helps, last = re.split(r"^=== (.*)\n", done.stdout, flags=re.M)
    assert last == ""
    assert helps[1::2] == [f"{name} 0" for name in sorted(SCRIPTS)], done.stderr
    for name, text in zip(sorted(SCRIPTS), helps[::2], strict=True):
        assert text.startswith(f"usage: {name} ")
        assert f"\n    {name}" in text or f"-- {name}" in text
        assert "jobs/" not in text


@pytest.mark.slow
def test_a_dry_run_of_the_installed_package(run_installed):
    done, _ = run_installed("alexnet-tune", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "nothing was started" in done.stdout


@pytest.mark.slow
def test_an_error_of_the_installed_package_names_its_own_command(run_installed):
    done, place = run_installed("alexnet-train", "--data", "nowhere")
    assert done.returncode == 2
    assert done.stderr.endswith(f"make one with: alexnet-prepare --source DIR --output {place / 'nowhere'}\n")


@pytest.mark.ray
@pytest.mark.slow
def test_the_installed_package_trains(run_installed, digit_shards):
    """With a Ray of its own; the bundled digits are prepared in tests/cli/test_cli_train.py."""
    settings = ("--workers", "1", "--layout", "single", "--epochs", "1")
    done, place = run_installed("alexnet-train", "--data", digit_shards[0], *settings, "--name", "first")
    assert done.returncode == 0, done.stderr
    assert Path(place, "runs", "first", "result.json").exists()


def test_no_message_names_a_job_but_as_it_was_started():
    said = []
    for file in sorted((ROOT / "orchestrator").rglob("*.py")):
        tree = ast.parse(file.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        said += [
            f"{file.relative_to(ROOT)}:{text.lineno}: use command() of orchestrator/base/environment.py"
            for text in texts
            if id(text) not in docs
            # what runs on a cluster runs in its copy of the clone
            and "python jobs/" in text.value.replace("ray job submit -- python jobs/", "")
        ]
    assert [line for line in said if not line.startswith("orchestrator/base/environment.py:")] == []
