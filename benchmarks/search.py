"""What does stopping early save, and what does it cost? The same trials judged by asha and trained to the end.

    python jobs/prepare.py --source CIFAR10 --output SHARDS --encoding raw
    python benchmarks/search.py --data SHARDS
    python benchmarks/search.py --data SHARDS --epochs 9 -- --precision bf16 --grace-epochs 1 --reduction-factor 4

Both searches are whole runs of jobs/tune.py, one after the other, with the same seed and so the same configurations:
learning rate, weight decay and the LRN constants of a slim two-column net; the scheduler as jobs/tune.py has it, or as
flags behind -- say. Goal: asha finds an error within one point of the best of all trials with a third of their epochs;
since no scheduler stops the paper's trial, the best of the others is shown beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

from orchestrator.search.journal import PAPER_TRIAL, Journal

ROOT = Path(__file__).parent.parent
SETTINGS = ["--width", "0.125", "--global-batch-size", "128", "--flip", "--precision", "fp32"]


def search(scheduler: str, data: Path, folder: Path, args: Any) -> dict[str, Any]:
    settings = ["digits", *SETTINGS, "--data", str(data), "--scheduler", scheduler, "--name", scheduler]
    settings += ["--epochs", str(args.epochs), "--num-samples", str(args.num_samples), *args.flags]
    if (folder / "runs" / scheduler / "search.yaml").exists():
        settings = ["--resume", scheduler]
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), *settings]
    subprocess.run(command, cwd=folder, check=True, env={k: v for k, v in os.environ.items() if "MLFLOW" not in k})
    result: dict[str, Any] = json.loads((folder / "runs" / scheduler / "result.json").read_text())
    trials = {trial["number"]: trial for trial in result["trials"]}
    assert all(trial["status"] != "FAILED" for trial in trials.values())
    others = [number for number in trials if number != PAPER_TRIAL]
    journal = Journal(folder / "runs" / scheduler / "journal.jsonl")
    journal.close()
    return {
        "epochs": result["epochs_used"],
        "seconds": result["elapsed_s"],  # of all its sessions, if it was interrupted
        "best": result["best"],
        "best_of_others": min(others, key=lambda number: error_of(trials[number])),
        "importance": result["importance"],
        "against_the_paper": result["against_the_paper"],
        "trials": [
            {key: trial[key] for key in ("number", "status", "epochs", "values", "best")}
            | {"errors": [entry["val/top1_error"] for entry in journal.trials[trial["number"]].history]}
            for trial in result["trials"]
        ],
    }


def error_of(trial: dict[str, Any]) -> float:
    return float(trial["best"]["val/top1_error"])


def report(searches: dict[str, dict[str, Any]]) -> None:
    for name, found in searches.items():
        best, other = (found["trials"][found[key]] for key in ("best", "best_of_others"))
        print(
            f"{name}: {found['epochs']} epochs, {found['seconds']:.0f} s, "
            f"best top-1 error {100 * error_of(best):.2f} % (trial {best['number']}); "
            f"without the paper's trial {100 * error_of(other):.2f} % (trial {other['number']})"
        )
    asha, fifo = searches["asha"], searches["fifo"]
    share, wall = (asha[name] / fifo[name] for name in ("epochs", "seconds"))
    print(f"asha used {share:.2f} of the epochs, {wall:.2f} of the time")
    rung = min(trial["epochs"] for trial in asha["trials"])
    order = sorted(fifo["trials"], key=lambda trial: float(trial["errors"][rung - 1]))
    place = {trial["number"]: number for number, trial in enumerate(order, start=1)}
    for trial in sorted(fifo["trials"], key=error_of)[:5]:
        print(
            f"trial {trial['number']}: {100 * error_of(trial):.2f} %; after epoch {rung} it was number "
            f"{place[trial['number']]}; asha trained it for {asha['trials'][trial['number']]['epochs']} epochs"
        )


def main() -> None:
    flags = measure.parser(__doc__, "search")
    flags.add_argument("--data", type=Path, required=True, metavar="SHARDS")
    flags.add_argument("--num-samples", type=int, default=16)
    flags.add_argument("--epochs", type=int, default=18)
    flags.add_argument(
        "--keep", type=Path, metavar="DIR", help="where the searches stay, to go on if interrupted (default: nowhere)"
    )
    flags.add_argument("flags", nargs="*", help="of jobs/tune.py, for both searches")
    args = flags.parse_args()
    temporary = tempfile.TemporaryDirectory()
    folder = args.keep or Path(temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    results = {name: search(name, args.data.absolute(), folder, args) for name in ("asha", "fifo")}
    temporary.cleanup()
    configurations = [[trial["values"] for trial in found["trials"]] for found in results.values()]
    assert configurations[0] == configurations[1], "not the same configurations"
    report(results)
    settings = [*SETTINGS, "--epochs", str(args.epochs), *args.flags]
    measure.write(args.json, {"settings": settings, "searches": results})


if __name__ == "__main__":
    main()
