"""Classes of unequal size: weights of the loss, in every layout the same; errors class by class; a line about them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gloo import run_gloo

import alexnet
from alexnet.layouts import Layout, ShardedNet
from orchestrator.config.recipes import digits
from orchestrator.data.order import rank_slice
from orchestrator.train import worker as loop
from orchestrator.train.checkpoints import State
from orchestrator.train.classes import ClassErrors, has_top5, loss_weights, warn_if_unequal
from orchestrator.train.model import build_net
from orchestrator.train.step import WorkerStep

CLASSES = 10
BATCH, ROWS, STEPS = 12, 41, 6  # every fourth batch is of 5 images
KINDS = ("data", "columns", "hybrid")


def manifest_of(train, val=None):
    names = tuple(f"class {number}" for number in range(len(train)))
    return SimpleNamespace(classes=names, class_rows={"train": tuple(train), "val": tuple(val or train)})


def config_of(**changes):
    return digits().changed(global_batch_size=BATCH, class_weights="balanced", **changes)


# weights


def test_a_class_s_weight_is_inverse_to_its_images_and_1_on_average_over_them():
    counts = [30, 10, 20]
    weights = loss_weights(config_of(), manifest_of(counts), 3)
    assert weights == [60 / (3 * 30), 60 / (3 * 10), 60 / (3 * 20)]
    assert sum(weight * count for weight, count in zip(weights, counts, strict=True)) / 60 == pytest.approx(1)


def test_outputs_without_training_images_change_no_other_weight():
    assert loss_weights(config_of(), manifest_of([30, 0, 10]), 5) == [40 / 60, 1.0, 40 / 20, 1.0, 1.0]


def test_without_weights_there_are_none():
    assert loss_weights(digits(), manifest_of([30, 10]), 2) is None


def make_step(rank, kind, workers, weights, **changes):
    config = config_of(**changes)
    net = ShardedNet(build_net(config, CLASSES).double(), Layout(kind, workers), rank)
    optimizer = alexnet.PaperSGD(net.parameters(), config.lr, config.momentum, config.weight_decay)
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    mean = torch.full((72, 72, 3), 100.0)
    rows = {"train": ROWS, "val": ROWS}
    return WorkerStep(net, optimizer, mean, config, rows, bf16=False, class_weights=weights)


WEIGHTS = [4.0, 0.25, 0.5, 1.0, 2.0, 0.1, 3.0, 0.7, 1.5, 0.9]


def batch_of(step, first, last):
    """Rows first to last of the order, which belong to a step."""
    random = np.random.default_rng(step)
    size = min(BATCH, ROWS - step * BATCH)
    whole = {
        "image": random.integers(0, 256, (size, 64, 64, 3), dtype=np.uint8),
        "top": random.integers(0, 9, size, dtype=np.int32), "left": random.integers(0, 9, size, dtype=np.int32),
        "flip": random.integers(0, 2, size).astype(bool), "label": random.integers(0, CLASSES, size),
    }  # fmt: skip
    return {name: column[first - step * BATCH : last - step * BATCH] for name, column in whole.items()}


def train(rank, kind, workers, weights=WEIGHTS):
    """Losses of some steps, what validation then counts, and the weights of the net, on rank 0."""
    step = make_step(rank, kind, workers, weights)
    pending = []
    for number in range(STEPS):
        of_epoch = number % math.ceil(ROWS / BATCH)
        part = rank_slice(of_epoch, ROWS, BATCH, rank, workers)
        step.net.train()
        loss_sum, images = step.update(batch_of(of_epoch, *part), of_epoch, number)
        pending.append((loss_sum, images, 0.0))
    losses = torch.tensor(step.all_reduce(pending))[:, :2]
    step.net.eval()
    total = torch.zeros(4 + CLASSES, dtype=torch.float64)
    for number in range(math.ceil(ROWS / BATCH)):
        total += step.evaluate(batch_of(number, *rank_slice(number, ROWS, BATCH, rank, workers)), number)
    parts = {name: param.detach() for name, param in step.net.part.named_parameters()}
    whole = {name: tensor for name, tensor in step.net.gather_full(parts) if tensor is not None}
    return {"losses": losses, "validation": torch.tensor(step.all_reduce_total(total)), **whole}


def train_all(rank, workers):
    return {kind: train(rank, kind, workers) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_in_every_layout_weighted_training_and_the_errors_of_each_class_are_those_of_one_worker(workers):
    torch.set_num_threads(1)
    wanted = train(0, "single", 1)
    plain = train(0, "single", 1, None)
    assert not torch.allclose(plain["losses"], wanted["losses"], rtol=1e-3), "weights make a difference here"
    assert wanted["validation"][1] == wanted["validation"][4:].sum()
    for kind, found in run_gloo(workers, train_all, workers)[0].items():
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-10, atol=1e-12, msg=f"{kind} {workers}: {name}")


def test_a_weighted_step_is_the_update_on_the_weighted_sum_over_the_number_of_images():
    step, twin = make_step(0, "single", 1, WEIGHTS, dropout=0.0), build_net(config_of(dropout=0.0), CLASSES).double()
    batch = batch_of(3, 36, 41)
    x = (torch.from_numpy(batch["image"]).float() - 100).mul(step.config.pixel_scale).permute(0, 3, 1, 2).double()
    labels = torch.from_numpy(batch["label"])
    losses = -twin(x).log_softmax(1)[range(5), labels] * torch.tensor(WEIGHTS, dtype=torch.float64)[labels]
    (losses.sum() / 5).backward()
    loss_sum, images = step.update(batch, 3, 0)
    assert images == 5
    torch.testing.assert_close(loss_sum, losses.sum().detach())
    for ours, theirs in zip(step.net.parameters(), twin.parameters(), strict=True):
        lr, decay = step.config.lr, step.config.weight_decay
        torch.testing.assert_close(ours.detach(), (theirs - lr * theirs.grad - decay * lr * theirs).detach())


def test_classes_of_equal_size_train_as_without_weights_bit_for_bit():
    weights = loss_weights(config_of(), manifest_of([7] * CLASSES), CLASSES)
    assert weights == [1.0] * CLASSES
    weighted, plain = train(0, "single", 1, weights), train(0, "single", 1, None)
    assert all(torch.equal(weighted[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([100, 10, 50], None),
        (
            [100, 9, 50],
            "training images by class: from 9 (class 1) to 100 (class 0); --class-weights balanced compensates",
        ),
        (
            [5, 0],
            "from 0 (class 1) to 5 (class 0); --class-weights balanced compensates, but not for the 1 class without",
        ),
    ],
)
def test_one_line_says_that_classes_are_more_unequal_than_ten_to_one(counts, words):
    text = warn_if_unequal(digits(), manifest_of(counts))
    assert (words in text and "\n" not in text) if words else text is None
    assert warn_if_unequal(config_of(), manifest_of(counts)) is None


# errors


def test_errors_of_the_last_and_the_best_epoch_are_known_after_a_resumed_run_too():
    manifest = manifest_of([30, 2, 9], [8, 4, 0])
    errors = ClassErrors(manifest, {})
    errors.add(1, [2, 1, 0, 0])  # of a net with an output more
    errors.add(2, [4, 0, 0, 0])
    table = errors.table(last=2, best=1)
    assert table == [
        {"class": "class 0", "train": 30, "val": 8, "top1_error": 0.5, "best_top1_error": 0.25},
        {"class": "class 1", "train": 2, "val": 4, "top1_error": 0.0, "best_top1_error": 0.25},
        {"class": "class 2", "train": 9, "val": 0, "top1_error": None, "best_top1_error": None},
    ]
    result = {"per_class": table, "metrics": {"epoch": 2}, "best": {"epoch": 1}}
    again = ClassErrors(manifest, result)
    assert again.table(last=2, best=1) == table
    again.add(3, [8, 4, 0])
    assert [row["top1_error"] for row in again.table(last=3, best=1)] == [1.0, 1.0, None]
    assert [row["best_top1_error"] for row in again.table(last=3, best=1)] == [0.25, 0.25, None]
    assert [row["top1_error"] for row in again.table(last=4, best=1)] == [None] * 3
    other = ClassErrors(manifest_of([1, 1], [1, 1]), result)  # resumed on data of other classes
    assert [row["best_top1_error"] for row in other.table(last=2, best=1)] == [None, None]


# validation


@pytest.mark.parametrize("num_classes", [5, 6])
def test_validation_tells_the_errors_of_each_class_and_a_top_5_error_only_where_it_means_something(num_classes):
    worker = loop.Worker.__new__(loop.Worker)
    worker.net, worker.device = SimpleNamespace(eval=lambda: None), torch.device("cpu")
    worker.layout, worker.num_classes, worker.average = Layout("single", 1), num_classes, None
    worker.link = SimpleNamespace(all_reduce_stop=lambda device, workers: 0.0)
    worker.feed = SimpleNamespace(batches=lambda split, epoch: range(2))
    worker.manifest, worker.state = SimpleNamespace(rows={"train": 160, "val": 8}), State()
    by_class = [2, 1, *[0] * (num_classes - 2)]
    worker.step = SimpleNamespace(
        on_device=iter,
        evaluate=lambda batch, step, split: torch.tensor([6.0, 3, 1, 4, *by_class], dtype=torch.float64),
        all_reduce_total=lambda total: total.tolist(),
    )
    metrics = worker.validate(0)
    assert has_top5(num_classes) == (num_classes == 6)
    top5 = {"val/top5_error": 2 / 8} if num_classes == 6 else {}
    assert metrics == {"val/loss": 12 / 8, "val/top1_error": 6 / 8} | top5
    assert worker.wrong_by_class == [4, 2, *[0] * (num_classes - 2)]
    assert worker.probe(0) == {"train/top1_error": 6 / 8}, "8 of the 160, as many as of val"
    assert worker.wrong_by_class == [4, 2, *[0] * (num_classes - 2)], "of val still"
