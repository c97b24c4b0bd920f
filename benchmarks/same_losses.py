"""Do all layouts train the same net?

    python benchmarks/same_losses.py

Runs the digits recipe under every layout as a user would (jobs/train.py), prints the loss of every epoch side by side,
and draws the curves into docs/layouts.png. In float64, because ReLU and max pooling switch: where two layouts round
differently, and float32 does so in the seventh digit, another pixel wins now and then, and from there on the runs are
as different as runs of two seeds. In float64 that does not happen within a run.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
LAYOUTS = [("single", 1), ("data", 2), ("columns", 2), ("columns", 4), ("hybrid", 2), ("hybrid", 4)]


def train(kind: str, workers: int, epochs: int, precision: str, folder: Path) -> dict[str, Any]:
    name = f"{kind}-{workers}"
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "digits", "--layout", kind, "--workers", str(workers)]
    command += ["--epochs", str(epochs), "--precision", precision, "--output", str(folder / "runs"), "--name", name]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((folder / "runs" / name / "result.json").read_text())
    return result


def draw(curves: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    loss, apart = figure.subplots(1, 2)
    first = next(iter(curves.values()))
    epochs = range(1, len(first) + 1)
    for number, (name, curve) in enumerate(curves.items()):
        loss.plot(epochs, curve, label=name, linewidth=2 + 1.5 * (len(curves) - number), alpha=0.6)
        if number:
            apart.semilogy(epochs, [max(abs(a - b) / b, 1e-16) for a, b in zip(curve, first, strict=True)], label=name)
    loss.set(xlabel="epoch", ylabel="training loss", title="six layouts, one curve")
    apart.set(xlabel="epoch", title="relative difference from the single worker")
    for axes in (loss, apart):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--epochs", type=int, default=30)
    flags.add_argument("--precision", default="fp64", choices=["fp64", "fp32", "bf16"])
    flags.add_argument("--json", type=Path, default=measure.RESULTS / "same_losses.json", metavar="FILE")
    flags.add_argument("--picture", type=Path, default=ROOT / "docs" / "layouts.png", metavar="FILE")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        histories = {}
        for kind, workers in LAYOUTS:
            histories[f"{kind} {workers}"] = train(kind, workers, args.epochs, args.precision, Path(folder))["history"]
            print(f"{kind} {workers}: {histories[f'{kind} {workers}'][-1]}", flush=True)
    print(f"epoch  {'  '.join(f'{name:>12}' for name in histories)}")
    for epoch in range(args.epochs):
        print(f"{epoch + 1:>5}  {'  '.join(format(h[epoch]['train/loss'], '12.6f') for h in histories.values())}")
    for title, key in (("val loss", "val/loss"), ("top-1", "val/top1_error")):
        print(f"{title}: {'  '.join(f'{name} {history[-1][key]:.6f}' for name, history in histories.items())}")
    single = histories["single 1"]
    worst = max(
        abs(a["train/loss"] - b["train/loss"]) / b["train/loss"]
        for history in histories.values()
        for a, b in zip(history, single, strict=True)
    )
    print(f"largest relative difference of a training loss from the single worker's: {worst:.2g}")
    draw({name: [entry["train/loss"] for entry in history] for name, history in histories.items()}).savefig(
        args.picture, dpi=110, metadata={"Creation Time": datetime.date.today().isoformat()}
    )
    measure.write(args.json, {"histories": histories, "largest_relative_difference": worst})


if __name__ == "__main__":
    main()
