"""What do frozen layers save of a training step, and what does the probe of training images cost beside it?

    python benchmarks/freeze.py --threads 1

Steps of the digits' and of the full net with nothing frozen, conv1 and conv2, and all convolutions, and an evaluation
of the same batch, in turns. CPU time of the process, so that others on the machine matter less; give it one thread.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import measure
import numpy as np
import torch

from alexnet.layouts import Layout, ShardedNet
from orchestrator.config.recipes import digits, imagenette
from orchestrator.config.train import TrainConfig
from orchestrator.data.order import PROBE_SHARE
from orchestrator.train.model import build_net, make_optimizer
from orchestrator.train.step import WorkerStep

NETS = {"digits": (digits, 64), "full": (imagenette, 32)}  # and the images of a batch
FROZEN = ("none", "conv1,conv2", "conv")
CLASSES = 10


def make(config: TrainConfig, batch_size: int) -> tuple[WorkerStep, dict[str, Any]]:
    net = ShardedNet(build_net(config, CLASSES), Layout("single", 1))
    rows, side = {"train": 10**6, "val": 10**6}, config.crop_size
    mean = torch.zeros(side + 8, side + 8, 3)
    random, none = np.random.default_rng(0), np.zeros(batch_size, np.int32)
    batch = {
        "image": random.integers(0, 256, (batch_size, side, side, 3), dtype=np.uint8),
        "top": none, "left": none, "flip": none.astype(bool), "label": random.integers(0, CLASSES, batch_size),
    }  # fmt: skip
    return WorkerStep(net, make_optimizer(config, net.part), mean, config, rows, bf16=False), batch


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a turn, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    args = measure.parser(__doc__, "freeze").parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    for name, (recipe, size) in NETS.items():
        steps = {
            freeze: make(recipe().changed(freeze=freeze, global_batch_size=size, workers=1, layout="single"), size)
            for freeze in FROZEN
        }

        def update(freeze: str, steps: dict[str, Any] = steps) -> None:
            step, batch = steps[freeze]
            step.net.train()
            step.update(batch, 0, 0)

        def evaluate(steps: dict[str, Any] = steps) -> None:
            step, batch = steps["none"]
            step.net.eval()
            step.evaluate(batch, 0, "probe")

        turns = {freeze: lambda freeze=freeze, update=update: update(freeze) for freeze in FROZEN}
        seconds = take_turns(turns | {"evaluation": evaluate}, args.rounds)
        found[name] = {"cpu_s": seconds, "images": size}
        for freeze in FROZEN:
            share = seconds["evaluation"] / seconds[freeze] / PROBE_SHARE
            of_whole = seconds[freeze] / seconds["none"]
            found[name][freeze] = {"of_a_whole_step": of_whole, "probe_of_training": share}
            print(f"{name}, frozen {freeze}: {of_whole:.2f} of a whole step; the probe {share:.1%} of training")
    measure.write(args.json, found)


if __name__ == "__main__":
    main()
