"""A batch computed in parts is the batch: losses, weights and averages, in every layout."""

import numpy as np
import pytest
import torch
from gloo import run_gloo

import alexnet
from alexnet.layouts import Layout, ShardedNet
from orchestrator.cluster.layout_choice import worker_counts
from orchestrator.config.recipes import digits
from orchestrator.data.order import batch_parts, rank_slice
from orchestrator.train.model import build_net, make_optimizer, make_warmup
from orchestrator.train.step import WorkerStep

CLASSES, BATCH, ROWS, STEPS = 10, 24, 55, 5  # every third batch is of 7 images, which not all parts of all workers have
KINDS = ("data", "columns", "hybrid")
LARS = {"optimizer": "lars", "lr": 2.0, "warmup_epochs": 0.7, "ema": 0.4}


def make_step(rank, kind, workers, **changes):
    config = digits().changed(global_batch_size=BATCH, workers=workers, layout=kind, width=0.125, **changes)
    net = ShardedNet(build_net(config, CLASSES).double(), Layout(kind, workers), rank)
    optimizer = make_optimizer(config, net.part, net.whole_sums)
    average = alexnet.WeightAverage(net.part, config.ema) if config.ema else None
    return WorkerStep(
        net, optimizer, torch.full((72, 72, 3), 100.0), config, {"train": ROWS, "val": ROWS}, bf16=False,
        warmup=make_warmup(config, 3), average=average,
    )  # fmt: skip


def batch_of(step, rank, workers):
    """A worker's images of the global batch of a step."""
    random, size = np.random.default_rng(step), min(BATCH, ROWS - step * BATCH)
    lo, hi = (edge - step * BATCH for edge in rank_slice(step, ROWS, BATCH, rank, workers))
    whole = {
        "image": random.integers(0, 256, (size, 64, 64, 3), dtype=np.uint8),
        "top": random.integers(0, 9, size, dtype=np.int32), "left": random.integers(0, 9, size, dtype=np.int32),
        "flip": random.integers(0, 2, size).astype(bool), "label": random.integers(0, CLASSES, size),
    }  # fmt: skip
    return {name: column[lo:hi] for name, column in whole.items()}


def train(rank, kind, workers, **changes):
    """Losses, images, validation and weights of some steps, whole, on rank 0."""
    step = make_step(rank, kind, workers, **changes)
    counted, largest = [], 0

    def watch(layer, inputs):
        nonlocal largest
        largest = max(largest, len(inputs[0]))

    step.net.part.conv1.register_forward_pre_hook(watch)
    step.net.train()
    for total_step in range(STEPS):
        loss, images = step.update(batch_of(total_step % 3, rank, workers), total_step % 3, total_step)
        counted.append(torch.tensor([loss, images]))
    step.net.eval()
    counted = torch.stack(counted)
    evaluated = sum(step.evaluate(batch_of(number, rank, workers), number) for number in range(3))
    if workers > 1:
        torch.distributed.all_reduce(counted)
        torch.distributed.all_reduce(evaluated)
    found = {"counted": counted, "evaluated": evaluated, "largest": torch.tensor(largest)}
    weights = dict(step.net.part.named_parameters()) if step.average is None else step.average.weights
    for name, whole in step.net.gather_full(weights):
        if whole is not None:
            found[name] = whole.detach().clone()
    return found


def assert_same(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        if name != "largest":
            scale = wanted[name].abs().max()
            assert ((tensor - wanted[name]).abs().max() / scale).item() < tolerance, name


@pytest.mark.parametrize("settings", [{}, LARS])
@pytest.mark.parametrize("accumulate", [2, 3, 24])
def test_parts_give_the_losses_and_weights_of_the_whole_batch(accumulate, settings):
    """Dropout among them: what is zeroed of an image does not depend on its part."""
    whole, parts = (train(0, "single", 1, accumulate=number, **settings) for number in (1, accumulate))
    assert_same(parts, whole, 1e-12)
    assert whole["counted"][:, 1].tolist() == [24, 24, 7, 24, 24]
    assert (whole["largest"], parts["largest"]) == (BATCH, BATCH // accumulate)


def everything(rank, workers):
    return {kind: train(rank, kind, workers, accumulate=3, **LARS) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_every_layout_computes_parts_as_one_process_does_the_whole_batch(workers):
    wanted = train(0, "single", 1, **LARS)
    for kind, found in run_gloo(workers, everything, workers)[0].items():
        assert_same(found, wanted, 1e-10)
        assert found["largest"] == BATCH // 3 // (workers // 2 if kind == "columns" else workers)


def test_gradients_are_exchanged_once_an_update_however_many_parts():
    """With each part, the exchange would be repeated, and what was summed before would be summed again."""
    step, kept = make_step(0, "single", 1, accumulate=4), []
    accumulating = step.net.accumulating
    step.net.accumulating = lambda: kept.append(1) or accumulating()
    step.update(batch_of(0, 0, 1), 0, 0)
    assert len(kept) == 3


def test_every_image_is_in_one_part_and_parts_without_images_are_left_out():
    for step, size in ((0, 24), (2, 7)):
        for workers in (1, 2, 4):
            parts = batch_parts(step, ROWS, BATCH, workers, 6)
            images = [position for part in parts for lo, hi in part for position in range(lo, hi)]
            assert sorted(images) == list(range(step * BATCH, step * BATCH + size))
            assert all(any(lo < hi for lo, hi in part) for part in parts)
    assert batch_parts(0, ROWS, BATCH, 2, 3) == [[(0, 4), (12, 16)], [(4, 8), (16, 20)], [(8, 12), (20, 24)]]
    assert len(batch_parts(2, ROWS, BATCH, 4, 6)) == 2  # of 1, 2, 2 and 2 images


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"accumulate": 3}, "accumulate = 3: the 32 images of each worker cannot be divided .*; 2 or 4 would do"),
        ({"accumulate": 64}, "accumulate = 64: the 32 images of each worker .*; 16 or 32 would do"),
        ({"accumulate": 2, "global_batch_size": 2}, "accumulate = 2: the 1 image of each worker .* parts; 1 would do"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused_in_one_line(fields, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        worker_counts(digits().changed(**fields))
    assert worker_counts(digits().changed(accumulate=32)) == [2]


def test_of_a_range_of_workers_those_remain_whose_images_can_be_divided():
    assert worker_counts(digits().changed(workers="1..8", layout="data", accumulate=16)) == [4, 2, 1]
