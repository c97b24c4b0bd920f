"""What does stopping early save, and what does it cost? The same trials judged by asha and trained to the end.

    python jobs/prepare.py --source CIFAR10 --output SHARDS --encoding raw
    python benchmarks/search.py --data SHARDS

Both searches are whole runs of jobs/tune.py, one after the other, with the same seed and so the same configurations:
learning rate, weight decay and the LRN constants of a slim two-column net; the scheduler as jobs/tune.py has it. Goal:
asha finds an error within one point of the best of all trials with a third of their epochs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).parent.parent
SETTINGS = ["--width", "0.125", "--global-batch-size", "128", "--flip", "--precision", "fp32"]


def search(scheduler: str, data: Path, folder: Path, args: Any) -> dict[str, Any]:
    settings = ["digits", *SETTINGS, "--data", str(data), "--scheduler", scheduler, "--name", scheduler]
    settings += ["--epochs", str(args.epochs), "--num-samples", str(args.num_samples)]
    if (folder / "runs" / scheduler / "search.yaml").exists():
        settings = ["--resume", scheduler]
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), *settings]
    subprocess.run(command, cwd=folder, check=True, env={k: v for k, v in os.environ.items() if "MLFLOW" not in k})
    result: dict[str, Any] = json.loads((folder / "runs" / scheduler / "result.json").read_text())
    trials = {trial["number"]: trial for trial in result["trials"]}
    assert all(trial["status"] != "FAILED" for trial in trials.values())
    return {
        "epochs": result["epochs_used"],
        "seconds": result["elapsed_s"],  # of all its sessions, if it was interrupted
        "best": trials[result["best"]],
        "papers": trials[0],
        "importance": result["importance"],
        "against_the_paper": result["against_the_paper"],
        "values": [trial["values"] for trial in result["trials"]],
        "epochs_of_trials": [trial["epochs"] for trial in result["trials"]],
    }


def main() -> None:
    flags = measure.parser(__doc__, "search")
    flags.add_argument("--data", type=Path, required=True, metavar="SHARDS")
    flags.add_argument("--num-samples", type=int, default=16)
    flags.add_argument("--epochs", type=int, default=18)
    flags.add_argument(
        "--keep", type=Path, metavar="DIR", help="where the searches stay, to go on if interrupted (default: nowhere)"
    )
    args = flags.parse_args()
    temporary = tempfile.TemporaryDirectory()
    folder = args.keep or Path(temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    results = {name: search(name, args.data.absolute(), folder, args) for name in ("asha", "fifo")}
    temporary.cleanup()
    assert results["asha"].pop("values") == results["fifo"].pop("values"), "not the same configurations"
    for name, result in results.items():
        error = 100 * result["best"]["best"]["val/top1_error"]
        print(f"{name}: {result['epochs']} epochs, {result['seconds']:.0f} s, best top-1 error {error:.2f} %")
    share, wall = (results["asha"][name] / results["fifo"][name] for name in ("epochs", "seconds"))
    print(f"asha used {share:.2f} of the epochs, {wall:.2f} of the time")
    measure.write(args.json, {"settings": SETTINGS, "epochs": args.epochs, "searches": results})


if __name__ == "__main__":
    main()
