"""Is a whole run faster than the plain loop that a user would write?

    python benchmarks/end_to_end.py --source IMAGEFOLDER --precision fp32 bf16

IMAGEFOLDER has train/CLASS and val/CLASS. The contenders train one epoch after another, in turns, each in a process of
its own, and each epoch ends with the errors on all of val:

    ours            jobs/train.py imagenette, one worker, from shards of 256-pixel JPEGs, made before
    plain           ImageFolder, Resize(256), RandomCrop(224), flip, DataLoader with one process per thread,
                    torchvision's AlexNet, torch.optim.SGD
    channels_last   the same in channels_last, as PyTorch's guide to CPUs advises
    step            our training step alone, again and again on one batch in memory: the limit

Images/s are training images by seconds from the end of the first epoch to the end of the last: without start-up, with
validation, and ours with its checkpoints and its errors on training images, too. `train` counts training alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

# isort: split
import runs
import torch
import torchvision
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import alexnet

BATCH_SIZE = 128
CONTENDERS = ("ours", "plain", "channels_last", "step")
STEPS = 12  # of the step alone


def loader(folder: Path, transforms: list[Any], workers: int, *, shuffle: bool) -> DataLoader[Any]:
    ready = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229,) * 3)]
    images = torchvision.datasets.ImageFolder(folder, v2.Compose([v2.Resize(256), *transforms, *ready]))
    return DataLoader(images, BATCH_SIZE, shuffle=shuffle, num_workers=workers, drop_last=False)


def plain(source: Path, epochs: int, bf16: bool, workers: int, memory_format: torch.memory_format) -> dict[str, float]:
    """The loop. Returns images/s."""
    train = loader(source / "train", [v2.RandomCrop(224), v2.RandomHorizontalFlip()], workers, shuffle=True)
    val = loader(source / "val", [v2.CenterCrop(224)], workers, shuffle=False)
    classes = len(train.dataset.classes)  # type: ignore[attr-defined]
    net = torchvision.models.alexnet(num_classes=classes).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    ends, training = [], 0.0
    for epoch in range(epochs):
        begun = time.perf_counter()
        net.train()
        for images, labels in train:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                scores = net(images.contiguous(memory_format=memory_format))
            loss = F.cross_entropy(scores.float(), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        training += (time.perf_counter() - begun) if epoch else 0
        net.eval()
        wrong = 0
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for images, labels in val:
                wrong += int((net(images.contiguous(memory_format=memory_format)).argmax(1) != labels).sum())
        ends.append(time.perf_counter())
    num = len(train.dataset) * (epochs - 1)  # type: ignore[arg-type]
    return {"whole": num / (ends[-1] - ends[0]), "train": num / training}


def step(bf16: bool, classes: int) -> dict[str, float]:
    """Our step on one batch."""
    alexnet.keep_freed_memory()
    net = alexnet.build("paper", classes, init="he")
    optimizer = alexnet.PaperSGD(net.parameters(), lr=1e-4)
    images = torch.randn(BATCH_SIZE, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels, times = torch.randint(0, classes, (BATCH_SIZE,)), []
    for _ in range(STEPS):
        begun = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = net(images)
        F.cross_entropy(scores.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(time.perf_counter() - begun)
    rate = BATCH_SIZE / statistics.median(times[2:])
    return {"whole": rate, "train": rate}


def ours(shards: Path, epochs: int, precision: str, folder: Path) -> dict[str, float]:
    """A run of jobs/train.py, whose epochs end when it says so."""
    name = f"{precision}-{time.time_ns()}"
    command = runs.command("train", "imagenette", "--data", str(shards), "--name", name, "--epochs", str(epochs))
    command += ["--precision", precision, "--global-batch-size", str(BATCH_SIZE)]
    ends = []
    with subprocess.Popen(command, cwd=folder, env=runs.environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch ") and "top-1 error" in line:
                ends.append(time.perf_counter())
    if process.returncode or len(ends) != epochs:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}, {len(ends)} epochs")
    result = json.loads((folder / "runs" / name / "result.json").read_text())
    num = json.loads((shards / "manifest.json").read_text())["rows"]["train"]
    rates = [epoch["train/images_per_s"] for epoch in result["history"][1:]]
    return {"whole": num * (epochs - 1) / (ends[-1] - ends[0]), "train": statistics.harmonic_mean(rates)}


def alone(contender: str, args: argparse.Namespace, precision: str) -> dict[str, float]:
    """Another process of this script, for one turn of a contender that is not `ours`."""
    command = [sys.executable, __file__, "--source", str(args.source), "--epochs", str(args.epochs)]
    command += ["--threads", str(args.threads), "--precision", precision, "--only", contender]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    flags = measure.parser(__doc__, "end_to_end")
    flags.set_defaults(rounds=3)
    flags.add_argument("--source", type=Path, required=True, metavar="IMAGEFOLDER")
    flags.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    flags.add_argument("--epochs", type=int, default=3, help="of each turn, two or more (default: %(default)s)")
    flags.add_argument("--only", choices=CONTENDERS[1:], help=argparse.SUPPRESS)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        bf16 = args.precision == ["bf16"]
        memory_format = torch.channels_last if args.only == "channels_last" else torch.contiguous_format
        classes = len(list((args.source / "train").iterdir()))
        rates = (
            step(bf16, classes) if args.only == "step"
            else plain(args.source, args.epochs, bf16, args.threads, memory_format)
        )  # fmt: skip
        print(json.dumps(rates))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begun = time.perf_counter()
        runs.job("prepare", "--source", str(args.source.absolute()), "--output", "shards", folder=folder)
        prepare_s = time.perf_counter() - begun
        for precision in args.precision:
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
            for _ in range(args.rounds):
                for name, found in turns.items():
                    if name == "ours":
                        found.append(ours(folder / "shards", args.epochs, precision, folder))
                    else:
                        found.append(alone(name, args, precision))
                    print(f"{precision} {name:<14} {found[-1]['whole']:6.1f} images/s", flush=True)
            results[precision] = {"turns": turns} | {
                f"ours_over_{name}": statistics.median(
                    mine[kind] / other[kind] for mine, other in zip(turns["ours"], turns[name], strict=True)
                )
                for name, kind in (("plain", "whole"), ("channels_last", "whole"), ("step", "train"))
            }
            for name, value in results[precision].items():
                if name != "turns":
                    print(f"{precision} {name:<24} {value:.2f}")
    measure.write(args.json, {"source": args.source.name, "epochs": args.epochs, "batch_size": BATCH_SIZE,
                              "prepare_s": prepare_s, "precision": results})  # fmt: skip


if __name__ == "__main__":
    main()
