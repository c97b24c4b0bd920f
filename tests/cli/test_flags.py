"""What all commands share: --help, --version, -v, and errors of one line."""

import importlib
import re
import sys

import pytest
from conftest import ROOT, refused

import alexnet
from orchestrator.base.environment import command
from orchestrator.cli import flags

NAMES = sorted(job.stem for job in (ROOT / "jobs").glob("*.py"))
NEEDED = {
    "evaluate": ["MODEL"],
    "look": ["MODEL"],
    "predict": ["MODEL", "--source", "x"],
    "tracking": ["status"],
    "convert": ["MODEL", "--to", "net.onnx"],
}


def called(name, *args, monkeypatch, as_script=False):
    """The exit status of a command, of whose arguments --help and --version end it early."""
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/alexnet-{name}" if as_script else f"jobs/{name}.py", *args])
    return importlib.import_module(f"orchestrator.cli.{name}").script()


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_command_as_it_was_started(name, monkeypatch, capsys):
    for as_script, shown, other in (
        (False, f"python jobs/{name}.py", f"alexnet-{name} "),
        (True, f"alexnet-{name}", "jobs/"),
    ):
        with pytest.raises(SystemExit, match="0"):
            called(name, "--help", monkeypatch=monkeypatch, as_script=as_script)
        text = capsys.readouterr().out
        assert shown in text
        assert other not in text
        assert command(name) == shown
        assert text.startswith(f"usage: {shown.split('/')[-1]} ")


@pytest.mark.parametrize("name", NAMES)
def test_every_command_tells_its_version(name, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        called(name, "--version", monkeypatch=monkeypatch)
    assert capsys.readouterr().out == f"alexnet-orchestrator {alexnet.__version__}\n"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("given", "verbose"), [([], False), (["-v"], True), (["--verbose"], True)])
def test_every_command_sets_up_its_log_before_it_begins(name, given, verbose, monkeypatch):
    happened = []
    monkeypatch.setattr(flags.logs, "set_up", happened.append)
    module = importlib.import_module(f"orchestrator.cli.{name}")
    monkeypatch.setattr(module, "main", lambda flags, args: happened.append("main") or 7)
    assert called(name, *NEEDED.get(name, []), *given, monkeypatch=monkeypatch) == 7
    assert happened == [verbose, "main"]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistyped_flag_is_one_line_with_a_suggestion(name, tmp_path, monkeypatch, capsys):
    line = refused(name, [*NEEDED.get(name, []), "--verbos"], tmp_path, monkeypatch, capsys)
    assert line == f"{name}.py: error: unknown argument --verbos; did you mean --verbose?"


@pytest.mark.parametrize("name", NAMES)
def test_no_two_groups_of_a_help_have_one_title_and_no_default_is_said_that_is_not(name):
    text = importlib.import_module(f"orchestrator.cli.{name}").parser().format_help()
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert len(titles) == len(set(titles))
    assert "TEXT" not in text
    for option in re.split(r"\n  (?=--)", text):
        if "(default: automatic)" in " ".join(option.split()):
            assert " ".join(option.split()).count("automatic") == 2, option  # which says what that is


def test_a_search_has_no_time_limit_by_default():
    text = " ".join(importlib.import_module("orchestrator.cli.tune").parser().format_help().split())
    assert "--time-budget TIME time limit such as 90s, 30m or 2h" in text
    assert "ends with what it has (default: none)" in text


@pytest.mark.parametrize(
    ("job", "args", "name"),
    [
        ("predict", ["model", "--source", ""], "source"),
        ("prepare", ["--source", "photos", "--output", ""], "output"),
        ("evaluate", ["one", ""], "models"),
    ],
)
def test_an_empty_argument_is_not_the_current_folder(tmp_path, monkeypatch, capsys, job, args, name):
    assert refused(job, args, tmp_path, monkeypatch, capsys) == f"{job}.py: error: {name}: is empty"
    assert list(tmp_path.iterdir()) == []
