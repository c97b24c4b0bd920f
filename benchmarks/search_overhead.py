"""What does a search cost beside the arithmetic of its trials?

    python benchmarks/search_overhead.py

Eight trials on the bundled digits, trained to the end: once as a search, jobs/tune.py with its two trials at a time of
a thread each, and once as plain loops in this process, one after the other, with all threads: the same nets on the same
batches, read by the same code, without Ray. The loops' errors are held against the trials'. Goal: the search takes at
most 1.25 times as long. What a trial's start-up takes is read from the search's journal.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch.nn import functional as F

import alexnet
from alexnet.dropout import BatchPosition
from alexnet.layouts import Layout, ShardedNet
from orchestrator.base.storage import StoragePath
from orchestrator.config.models import read_yaml
from orchestrator.config.train import TrainConfig, make_config
from orchestrator.data.order import rank_slice
from orchestrator.data.reader import Task, TaskReader
from orchestrator.data.shards import Manifest, read_manifest, read_mean_image
from orchestrator.search.journal import Journal
from orchestrator.train.model import build_net

ROOT = Path(__file__).parent.parent


def plain_loop(config: TrainConfig, folder: StoragePath, manifest: Manifest) -> float:
    """Train to the end in this process; returns the last validation error."""
    reader = TaskReader(folder, manifest, config, 0, 1)
    mean = torch.from_numpy(read_mean_image(folder, manifest))
    subtract_mean = alexnet.MeanSubtraction(mean, config.crop_size, config.pixel_scale)
    net = ShardedNet(build_net(config, len(manifest.classes)), Layout("single", 1), 0)
    optimizer = alexnet.PaperSGD(net.parameters(), config.lr, config.momentum, config.weight_decay)
    schedule = alexnet.plateau_schedule(optimizer, num_drops=config.lr_drops, patience=config.lr_patience)
    updates, error = 0, 1.0

    def scores(split: str, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        lo, hi = rank_slice(step, manifest.rows[split], config.global_batch_size, 0, 1)
        batch = reader.read(Task(epoch, split, step, step + 1), np.arange(lo, hi))
        cut = [torch.from_numpy(batch[name]) for name in ("top", "left", "flip")]
        x = subtract_mean(torch.from_numpy(batch["image"]), cut[0], cut[1], cut[2].bool())
        where = BatchPosition(config.seed, updates, torch.arange(hi - lo))
        return net(x, where, [hi - lo]), torch.from_numpy(batch["label"])

    for epoch in range(config.epochs):
        net.train()
        for step in range(-(-manifest.rows["train"] // config.global_batch_size)):
            found, labels = scores("train", epoch, step)
            torch.autograd.backward(F.cross_entropy(found, labels))
            optimizer.step()
            net.zero_grad()
            updates += 1
        net.eval()
        wrong = 0.0
        with torch.no_grad():
            for step in range(-(-manifest.rows["val"] // config.global_batch_size)):
                found, labels = scores("val", epoch, step)
                wrong += float(alexnet.count_errors(found, labels)[0])
        error = wrong / manifest.rows["val"]
        schedule.step(error)
    return error


def start_up(journal: Path) -> dict[str, Any]:
    """Seconds, from the journal's times; they add up but for medians, and news that is fetched twice a second."""
    at: dict[str, dict[int, float]] = {"trial": {}, "run": {}, "started": {}}
    workers: dict[int, float] = {}
    epochs: dict[int, list[float]] = {}
    for event in (json.loads(line) for line in journal.read_text().splitlines()):
        if event["event"] in at and "number" in event:
            at[event["event"]].setdefault(event["number"], event["at_s"])
        if event["event"] == "started":
            workers.setdefault(event["number"], event["after_s"])
        elif event["event"] == "epoch":
            epochs.setdefault(event["number"], []).append(event["at_s"])

    def parts(number: int) -> dict[str, float]:
        asked, ready, started = (at[event][number] for event in ("trial", "run", "started"))
        first, usual = epochs[number][0], statistics.median(np.diff(epochs[number]))
        return {
            "trial_s_process": ready - asked,
            "end_of_the_trial_before": started - workers[number] - ready,
            "workers": workers[number],
            "first_epoch_beyond_others": first - started - usual,
            "in_all": first - usual - asked,
        }

    numbers = sorted(at["trial"], key=lambda number: at["trial"][number])
    found = [parts(number) for number in numbers]
    return {"ray_and_data": at["trial"][numbers[0]]} | {
        name: {part: statistics.median(each[part] for each in some) for part in some[0]}
        for name, some in (("cold", found[:2]), ("warm", found[2:]))
    }


def take_turn(args: Any, folder: Path) -> dict[str, Any]:
    """The search, and then the same loops."""
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), "--scheduler", "fifo", "--name", "search"]
    command += ["--num-samples", str(args.trials), "--epochs", str(args.epochs)]
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, env={k: v for k, v in os.environ.items() if "MLFLOW" not in k})
    search_s = time.perf_counter() - begin
    run = folder / "runs" / "search"
    parts, trials = start_up(run / "journal.jsonl"), Journal(run / "journal.jsonl").trials
    train = read_yaml(run / "search.yaml")["train"]
    place = StoragePath.of(folder / "runs" / "_data" / "digits")
    manifest = read_manifest(place)
    plain_loop(make_config(**train | {"epochs": 1}), place, manifest)  # warm-up
    loops = []
    for record in trials.values():
        begin = time.perf_counter()
        error = plain_loop(make_config(**train | record.values), place, manifest)
        loops.append(time.perf_counter() - begin)
        theirs = record.history[-1]["val/top1_error"]
        print(f"trial {record.number}: {loops[-1]:.1f} s, error {error:.4f}, in the search {theirs:.4f}")
        assert abs(error - theirs) < 0.03, "not the same training"
    ratio = search_s / sum(loops)
    print(f"search {search_s:.0f} s, loops one after the other {sum(loops):.0f} s: {ratio:.2f} times", flush=True)
    return {"search_s": search_s, "loops_s": loops, "ratio": ratio, "start_up_s": parts}


def main() -> None:
    flags = measure.parser(__doc__, "search_overhead")
    flags.add_argument("--trials", type=int, default=8)
    flags.add_argument("--epochs", type=int, default=30)
    flags.set_defaults(rounds=2)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    alexnet.keep_freed_memory()
    turns = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as temporary:
            turns.append(take_turn(args, Path(temporary)))
    print(json.dumps([turn["start_up_s"] for turn in turns], indent=1))
    measure.write(args.json, {"turns": turns})


if __name__ == "__main__":
    main()
