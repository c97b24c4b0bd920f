"""What is a trained net worth on other classes with few photographs? Fine-tuned against trained from scratch.

    python benchmarks/fine_tuning.py --source IMAGEFOLDER --keep DIR

IMAGEFOLDER has train/CLASS and val/CLASS of ten classes or more. A net learns the first five classes; then, for each
seed, 200 photographs of the next five, 40 a class, are drawn by that seed, and two runs of jobs/train.py train on them:
one starts from the net, one from random weights. Each has its own rate and number of epochs, below. The error is that
of the last epoch, on all validation images of these five classes.
"""

import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import measure
from runs import interval, job, run

CLASSES = 5
CONTENDERS = {"scratch": ["--lr", "0.01", "--epochs", "30"], "started": ["--lr", "0.003", "--epochs", "15"]}
BATCH = ["--global-batch-size", "40", "--lr-patience", "8"]


def link(source: Path, place: Path, classes: list[str], images: int | None = None, seed: int = 0) -> None:
    """Class folders of links to photographs: all of val; of train all, or `images` a class drawn by `seed`."""
    for split in ("train", "val"):
        for name in classes:
            files = sorted((source / split / name).iterdir())
            if split == "train" and images is not None:
                files = random.Random(f"{seed} {name}").sample(files, images)
            (place / split / name).mkdir(parents=True)
            for file in files:
                (place / split / name / file.name).symlink_to(file)


def shards(folder: Path, name: str, make: Any) -> str:
    if not (folder / name).exists():
        make(folder / f"{name}-images")
        job("prepare", "--source", f"{name}-images", "--output", name, folder=folder)
    return name


def main() -> None:
    flags = measure.parser(__doc__, "fine_tuning")
    flags.add_argument("--source", type=Path, required=True, metavar="IMAGEFOLDER")
    flags.add_argument("--width", default="0.5", help="of the net (default: %(default)s)")
    flags.add_argument("--epochs", default="20", help="on the first five classes (default: %(default)s)")
    flags.add_argument("--images", type=int, default=200, help="of the next five classes (default: %(default)s)")
    flags.add_argument("--seeds", type=int, default=3, help="two or more (default: %(default)s)")
    flags.add_argument(
        "--keep", type=Path, metavar="DIR", help="where the runs stay, to go on if interrupted (default: nowhere)"
    )
    args = flags.parse_args()
    temporary = tempfile.TemporaryDirectory()
    folder = (args.keep or Path(temporary.name)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    source = args.source.absolute()
    names = sorted(path.name for path in (source / "train").iterdir())[: 2 * CLASSES]
    first, others = names[:CLASSES], names[CLASSES:]
    if len(others) < CLASSES or args.seeds < 2:
        flags.error(f"needs {2 * CLASSES} classes and two seeds")
    used = {"width": args.width, "epochs": args.epochs, "images": args.images, "batch": BATCH, **CONTENDERS}
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != used:
        flags.error(f"--keep {folder}: holds runs of other settings")
    kept.write_text(json.dumps(used))

    data = shards(folder, "first", functools.partial(link, source, classes=first))
    net = run(folder, "net", "--data", data, "--width", args.width, "--epochs", args.epochs)
    print(f"the net: top-1 error {100 * net['metrics']['val/top1_error']:.2f} % on its own {CLASSES} classes")
    errors: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for seed in range(args.seeds):
        draw = functools.partial(link, source, classes=others, images=args.images // CLASSES, seed=seed)
        data = shards(folder, f"few-{seed}", draw)
        for name, settings in CONTENDERS.items():
            start = ["--start-from", "net"] if name == "started" else ["--width", args.width]
            result = run(folder, f"{name}-{seed}", "--data", data, "--seed", str(seed), *start, *BATCH, *settings)
            errors[name].append(result["metrics"]["val/top1_error"])
            print(f"seed {seed}: {name} {100 * errors[name][-1]:.2f} %")
    temporary.cleanup()
    gains = [a - b for a, b in zip(errors["scratch"], errors["started"], strict=True)]
    summary = {name: interval(values) for name, values in {**errors, "gain": gains}.items()}
    for name, (mean, half) in summary.items():
        print(
            f"{name}: {100 * mean:.2f} +- {100 * half:.2f} % (mean of {args.seeds} seeds, 95 % interval, Student's t)"
        )
    found = {"net": net["metrics"], "errors": errors, "summary": summary}
    measure.write(args.json, {"settings": used} | found)


if __name__ == "__main__":
    main()
