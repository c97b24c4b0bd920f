"""Fixtures for all tests. No test leaves anything outside its own folder."""

import io
import json
import logging
import os
import runpy
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

# Ray reads these when it is imported; left unset, it would write a token into the home directory
os.environ.pop("RAY_ADDRESS", None)
os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests that use onnxruntime themselves leave nothing in the home directory
os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)

from orchestrator.base.storage import StoragePath  # noqa: E402
from orchestrator.cli import start  # noqa: E402
from orchestrator.data.prepare import prepare  # noqa: E402
from orchestrator.data.shards import Manifest  # noqa: E402
from orchestrator.data.sources import open_source  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _jobs_within_this_process() -> Iterator[None]:
    """A job that is run in this process neither ends it nor starts a fork server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "end_without_teardown", lambda: lambda status: None)
        patch.setattr(start, "prepare_workers", lambda modules, with_ray: None)
        yield


@pytest.fixture(scope="session")
def compiled() -> None:
    """What numba compiles is in its cache: no test's patience depends on that."""
    from gloo import compile_kernels

    compile_kernels()


@pytest.fixture(scope="session")
def ray_here(compiled):
    """A private Ray in this process."""
    import ray

    from orchestrator.cluster.connection import connect

    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def here(ray_here) -> dict[str, str]:
    """The environment in which a job joins this process's Ray, which halves the time of a test."""
    import ray

    return {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"],
        "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"],
    }


@pytest.fixture(scope="session")
def digit_shards(ray_here, tmp_path_factory) -> tuple[Path, Manifest]:
    """The bundled digits as shards of uneven size, several per split."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    return folder, prepare(open_source("digits"), StoragePath.of(folder), rows_per_shard=500)


@pytest.fixture(scope="session")
def job(compiled, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a job as a user does: job("train", "--epochs", "1", cwd=...)."""
    default = tmp_path_factory.mktemp("cwd")

    def run(name: str, *args: object, cwd: Path = default, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, args)]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        return subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=500)

    return run


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused job prints."""
    return only_line(done.stdout, done.stderr)


def only_line(out: str, err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert "Traceback" not in out
    return lines[0]


def started(
    name: str, args: list[object], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, **env: str
) -> tuple[int, str, str]:
    """Status, output and errors of a job; run in this process, which has its imports already, and on its Ray."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    return int(ended.value.code or 0), *capsys.readouterr()


def refused(name: str, args: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The one line of a job that is refused with status 2; run in this process, which has its imports already."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return str(lines[0])


@pytest.fixture(scope="session")
def recorded() -> list[dict[str, float]]:
    """The history of an undisturbed digits run in float64, written by benchmarks/same_losses.py. Every layout and every
    CPU reproduces it within 1e-7, and so must every run that was disturbed. If a change alters it on purpose, run that
    benchmark again."""
    found = json.loads((ROOT / "benchmarks" / "results" / "same_losses.json").read_text())
    history: list[dict[str, float]] = found["histories"]["single 1"]
    return history


def assert_same_history(history, recorded):
    for a, b in zip(history, recorded[: len(history)], strict=True):
        assert (a["epoch"], a["step"], a["train/lr"]) == (b["epoch"], b["step"], b["train/lr"])
        for name in ("train/loss", "val/loss", "val/top1_error", "val/top5_error"):
            assert a[name] == pytest.approx(b[name], rel=1e-7), (a["epoch"], name)


def assert_nested(events: list[dict[str, Any]]) -> None:
    """In a trace, slices of a thread lie within each other or apart, or Perfetto drops some."""
    by_thread: dict[int, list[dict[str, Any]]] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: (e["ts"], -e["dur"])):
        stack = by_thread.setdefault(event["tid"], [])
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"] + 1e-3:
            stack.pop()
        if stack:
            assert event["ts"] + event["dur"] <= stack[-1]["ts"] + stack[-1]["dur"] + 1e-3, (event, stack[-1])
        stack.append(event)


@pytest.fixture
def s3() -> Iterator[tuple[StoragePath, Callable[[], None], Callable[[], None]]]:
    """A folder of a bucket, and functions that stop its server and start it again."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    root = f"s3://bucket/folder?{query}"
    reset = urllib.request.Request(
        f"http://127.0.0.1:{port}/moto-api/reset", method="POST"
    )  # of what tests left before
    urllib.request.urlopen(reset).close()
    fs, _ = StoragePath.of(root)._opened()
    fs.create_dir("bucket")
    servers = [server]

    def restart() -> None:
        again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        again.start()
        servers.append(again)

    yield StoragePath.of(root), server.stop, restart
    servers[-1].stop()


@pytest.fixture
def photographs(tmp_path) -> Path:
    """An ImageFolder tree of two classes: smooth colour pictures of several sizes and shapes."""
    return make_photographs(tmp_path / "photographs", {"train": 12, "val": 4})


def make_photographs(root: Path, counts: dict[str, int]) -> Path:
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(("apple", "pear")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = [(90, 120), (300, 200), (70, 70)][i % 3]
                (root / split / name / f"{i:03d}.JPEG").write_bytes(picture(random, label, size))
    return root


def picture(
    random: np.random.Generator, label: int, size: tuple[int, int], form: str = "JPEG", mode: str = "RGB"
) -> bytes:
    """An encoded picture whose colour tells its class."""
    small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    small[..., label] = 255
    image = PIL.Image.fromarray(small).resize(size[::-1], PIL.Image.Resampling.BICUBIC).convert(mode)
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()
