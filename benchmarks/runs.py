"""What benchmarks of whole runs share: commands of the project, runs that are kept, and intervals over seeds."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy import stats

ROOT = Path(__file__).parent.parent
STOP_TIMEOUT_S = 60.0  # for a job that was asked to stop: its step and a checkpoint


def environment() -> dict[str, str]:
    """This process's, without the address of another MLflow."""
    return {key: value for key, value in os.environ.items() if "MLFLOW" not in key}


def command(name: str, *arguments: str) -> list[str]:
    """That of jobs/NAME.py."""
    return [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]


def job(name: str, *arguments: str, folder: Path) -> None:
    subprocess.run(command(name, *arguments), cwd=folder, check=True, env=environment())


def ended(arguments: list[str], folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, or ask it to stop when the time is over, so that it can end its own processes.

    Raises subprocess.TimeoutExpired then.
    """
    with subprocess.Popen(
        arguments, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.communicate(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def run(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    """The result of a run; one that is there already is not repeated, an interrupted one is resumed."""
    result = folder / "runs" / name / "result.json"
    if not result.exists() or json.loads(result.read_text())["status"] != "FINISHED":
        resumed = (folder / "runs" / name / "config.yaml").exists()
        job("train", *(["--resume", name] if resumed else ["imagenette", *arguments, "--name", name]), folder=folder)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread
