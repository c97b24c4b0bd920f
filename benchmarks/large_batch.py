"""What does a large batch cost in accuracy? Batches of 128 with SGD against 1,024 with LARS and a warm-up.

    python benchmarks/large_batch.py --data SHARDS --keep DIR

SHARDS are of jobs/prepare.py, with 1,024 training images or more. For every seed, each contender is a run of
jobs/train.py imagenette on the same images for the same number of epochs. The large batches are computed in parts, so
that no run needs more memory than another. The error is that of the last epoch, on all validation images.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import measure
from runs import interval, run

SMALL, LARGE = 128, 1024
CONTENDERS = {
    "sgd": ["--global-batch-size", str(SMALL)],
    "lars": ["--global-batch-size", str(LARGE), "--accumulate", str(LARGE // SMALL), "--optimizer", "lars"],
}


def main() -> None:
    flags = measure.parser(__doc__, "large_batch")
    flags.add_argument("--data", type=Path, required=True, metavar="SHARDS")
    flags.add_argument("--width", default="0.5", help="of the net (default: %(default)s)")
    flags.add_argument("--input-size", default="224", help="in pixels (default: %(default)s)")
    flags.add_argument("--epochs", default="20", help="of every run (default: %(default)s)")
    flags.add_argument("--sgd-lr", default="0.01", help="default: %(default)s")
    flags.add_argument("--lars-lr", default="5", help="default: %(default)s")
    flags.add_argument("--warmup-epochs", default="2", help="of LARS (default: %(default)s)")
    flags.add_argument("--seeds", type=int, default=3, help="two or more (default: %(default)s)")
    flags.add_argument(
        "--keep", type=Path, metavar="DIR", help="where the runs stay, to go on if interrupted (default: nowhere)"
    )
    args = flags.parse_args()
    if args.seeds < 2:
        flags.error("an interval needs two seeds")
    temporary = tempfile.TemporaryDirectory()
    folder = (args.keep or Path(temporary.name)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    own = {"sgd": ["--lr", args.sgd_lr], "lars": ["--lr", args.lars_lr, "--warmup-epochs", args.warmup_epochs]}
    common = ["--data", str(args.data.absolute()), "--width", args.width, "--input-size", args.input_size]
    common += ["--epochs", args.epochs]
    used = {"common": common, **{name: [*how, *own[name]] for name, how in CONTENDERS.items()}}
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != used:
        flags.error(f"--keep {folder}: holds runs of other settings")
    kept.write_text(json.dumps(used))

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for seed in range(args.seeds):
        for name in CONTENDERS:
            result = run(folder, f"{name}-{seed}", *common, *used[name], "--seed", str(seed))
            runs[name].append(result)
            print(f"seed {seed}: {name} {100 * result['metrics']['val/top1_error']:.2f} %", flush=True)
    temporary.cleanup()
    errors = {name: [each["metrics"]["val/top1_error"] for each in found] for name, found in runs.items()}
    more = [large - small for small, large in zip(errors["sgd"], errors["lars"], strict=True)]
    summary = {name: interval(values) for name, values in {**errors, "more errors of lars": more}.items()}
    for name, (mean, half) in summary.items():
        print(
            f"{name}: {100 * mean:.2f} +- {100 * half:.2f} % (mean of {args.seeds} seeds, 95 % interval, Student's t)"
        )
    speeds = {name: [each["images_per_s"] for each in found] for name, found in runs.items()}
    measure.write(args.json, {"settings": used, "errors": errors, "summary": summary, "images_per_s": speeds})


if __name__ == "__main__":
    main()
