"""What every benchmark shares: turns, medians, and where and when it was measured."""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alexnet.allocator import use_one_arena

use_one_arena()  # before torch, whose import starts threads: as the commands do

# isort: split
import torch  # noqa: E402

from orchestrator.base.environment import cpu_model  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--json", type=Path, default=RESULTS / f"{name}.json", metavar="FILE", help="where the result goes"
    )
    flags.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)")
    flags.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own choice)"
    )
    return flags


def take_turns(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn of every contender, after two warm-up turns of each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-2, rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the turns of how many times faster `fast` was than `slow` beside it."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def machine() -> dict[str, Any]:
    """Where and when."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine()} | result, indent=1) + "\n")
    print(f"wrote {path}")
