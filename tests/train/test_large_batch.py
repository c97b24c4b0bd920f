"""Warm-up and the average of the weights within a run: what is validated, what is saved, and that resuming is exact."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_accumulate
import test_layouts
import test_worker
import torch
from gloo import run_gloo
from safetensors.torch import load_file

import alexnet
from alexnet.layouts import Layout
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.train import checkpoints
from orchestrator.train import worker as loop
from orchestrator.train.keep import keep_weights
from orchestrator.train.model import make_warmup

SETTINGS = {"optimizer": "lars", "lr": 2.0, "warmup_epochs": 1.4, "ema": 0.6}  # a warm-up of five updates
FILES = {"model.safetensors", "velocity.safetensors", "state.json"}


def pieces(rank=0, kind="single", workers=1, **changes):
    step = test_accumulate.make_step(rank, kind, workers, **SETTINGS | changes)
    step.net.train()
    return step, alexnet.plateau_schedule(step.optimizer, patience=0)


def run(step, numbers):
    for number in numbers:
        batch = test_accumulate.batch_of(number % 3, step.net.rank, step.net.layout.workers)
        step.update(batch, number % 3, number)


def save(folder, step, schedule, state=None):
    checkpoints.save(
        folder, step.net, step.optimizer, schedule, state or checkpoints.State(), step.average
    )  # fmt: skip


def load(folder, step, schedule):
    return checkpoints.load(folder, step.net, step.optimizer, schedule, step.average)


# resuming


def test_a_run_resumed_within_its_warm_up_goes_on_bit_for_bit(tmp_path):
    whole, schedule = pieces()
    run(whole, range(3))
    save(tmp_path, whole, schedule, checkpoints.State(step=3))
    assert [group["lr"] for group in whole.optimizer.param_groups] == [2.0], "the schedule's, not the warm-up's"
    again, schedule2 = pieces()
    assert load(tmp_path, again, schedule2).step == 3
    for step in (whole, again):
        run(step, range(3, 7))
    for (name, a), b in zip(whole.net.part.named_parameters(), again.net.part.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(whole.average.weights[name], again.average.weights[name]), name
        assert not torch.equal(a, whole.average.weights[name]), name


def test_the_saved_model_is_the_average_and_the_last_weights_are_kept_to_resume_from(tmp_path):
    step, schedule = pieces()
    run(step, range(2))
    save(tmp_path, step, schedule)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"last.safetensors"}
    model, last = (load_file(tmp_path / name) for name in ("model.safetensors", "last.safetensors"))
    for name, param in step.net.part.named_parameters():
        assert torch.equal(model[name], step.average.weights[name])
        assert torch.equal(last[name], param)
    keep_weights(tmp_path, StoragePath(str(tmp_path / "run")), 1)
    assert {path.name for path in Path(tmp_path, "run", "kept-epoch-0001").iterdir()} == {"model.safetensors"}


def test_without_an_average_a_checkpoint_has_the_files_it_always_had(tmp_path):
    step, schedule = pieces(ema=0.0)
    run(step, range(2))
    save(tmp_path, step, schedule)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_an_average_that_a_checkpoint_lacks_begins_with_its_weights_and_one_too_many_is_left(tmp_path):
    plain, schedule = pieces(ema=0.0)
    averaged, schedule2 = pieces()
    run(plain, range(2))
    save(tmp_path, plain, schedule)
    load(tmp_path, averaged, schedule2)
    for name, param in plain.net.part.named_parameters():
        assert torch.equal(averaged.average.weights[name], param)
    run(averaged, range(2, 4))
    (tmp_path / "other").mkdir()
    save(tmp_path / "other", averaged, schedule2)
    load(tmp_path / "other", plain, schedule)
    for a, b in zip(plain.net.parameters(), averaged.net.parameters(), strict=True):
        assert torch.equal(a, b)


def save_in_one_layout_and_resume_in_another(rank, root):
    found = {}
    for first, then in (("columns", "hybrid"), ("hybrid", "data"), ("data", "columns")):
        step, schedule = pieces(rank, first, 2)
        run(step, range(3))
        if rank in step.net.layout.group_of(0):
            save(root / first if rank == 0 else None, step, schedule)
        torch.distributed.barrier()
        step, schedule = pieces(rank, then, 2)
        load(root / first, step, schedule)
        run(step, range(3, 6))
        found[first] = test_layouts.collected(step.net, step.average.weights, "average")
    return found


@pytest.mark.slow
def test_the_average_is_saved_whole_in_every_layout_and_resumed_in_any_other(tmp_path):
    for kind in test_accumulate.KINDS:
        (tmp_path / kind).mkdir()
    alone, _ = pieces()
    run(alone, range(6))
    for first, found in run_gloo(2, save_in_one_layout_and_resume_in_another, tmp_path)[0].items():
        for name, average in alone.average.weights.items():
            assert test_layouts.difference(found[f"average {name}"], average) < 1e-10, (first, name)


# within the loop


def worker_of(step, schedule, *, stop=0.0):
    """A worker at the validation of an epoch, without Ray."""
    worker = loop.Worker.__new__(loop.Worker)
    worker.config, worker.step, worker.net, worker.optimizer = step.config, step, step.net, step.optimizer
    worker.schedule, worker.average, worker.warmup = schedule, step.average, step.warmup
    worker.layout, worker.num_classes, worker.device = Layout("single", 1), test_accumulate.CLASSES, torch.device("cpu")
    worker.link = SimpleNamespace(all_reduce_stop=lambda device, workers: stop)
    batches = [test_accumulate.batch_of(number, 0, 1) for number in range(3)]
    worker.feed = SimpleNamespace(batches=lambda split, epoch: iter(batches))
    worker.manifest, worker.state = (
        SimpleNamespace(rows={"train": test_accumulate.ROWS, "val": test_accumulate.ROWS}),
        checkpoints.State(),
    )
    return worker


def test_validation_is_of_the_average_and_training_goes_on_with_the_weights():
    step, schedule = pieces()
    run(step, range(6))
    own = [param.detach().clone() for param in step.net.parameters()]
    found = worker_of(step, schedule).validate(0)["val/loss"]
    assert all(torch.equal(a, b) for a, b in zip(own, step.net.parameters(), strict=True))
    step.average, averages = None, step.average.weights
    with_weights = worker_of(step, schedule).validate(0)["val/loss"]
    with torch.no_grad():
        for name, param in step.net.part.named_parameters():
            param.copy_(averages[name])
    assert found == worker_of(step, schedule).validate(0)["val/loss"] != with_weights


def test_a_stop_within_validation_saves_the_weights_and_not_the_average_in_their_place(tmp_path):
    step, schedule = pieces()
    run(step, range(6))
    own = {name: param.detach().clone() for name, param in step.net.part.named_parameters()}
    worker = worker_of(step, schedule, stop=loop.STOP_CODES[loop.SAVE])
    worker.save = lambda metrics: save(tmp_path, step, schedule)
    with pytest.raises(loop.StopRequested):
        worker.validate(0)
    saved = load_file(tmp_path / "last.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in own.items())


def test_the_plateau_is_watched_from_the_first_validation_after_the_warm_up():
    """Two epochs of the four are warm-up, and no error ever falls."""
    worker = loop.Worker.__new__(loop.Worker)
    step, schedule = pieces(warmup_epochs=2.0, epochs=5, lr=2.0)
    worker.config, worker.state, worker.warmup, worker.optimizer = (
        step.config,
        checkpoints.State(),
        step.warmup,
        step.optimizer,
    )
    worker.schedule, worker.wrong_by_class, worker.precision, worker.device = schedule, [], "fp64", "cpu"
    worker.link, worker.layout = SimpleNamespace(report_event=lambda event: None, rank=0), Layout("single", 1)
    worker.agreed, worker.feed = SimpleNamespace(nodes=["a"]), SimpleNamespace(start=lambda epoch, step: None)
    rates = []

    def train_epoch(epoch):
        worker.state.step += 3
        rates.append(worker.lr)
        return {"train/lr": worker.lr}

    worker.train_epoch, worker.save = train_epoch, lambda metrics: None
    worker.validate, worker.probe = lambda epoch: {"val/top1_error": 0.9}, lambda epoch: {}
    worker.run()
    assert rates == [pytest.approx(rate) for rate in (2.0 * 4 / 6, 2.0, 2.0, 2.0, 0.2)]


def test_the_warm_up_has_the_steps_of_its_epochs_at_least_one_if_there_is_any():
    steps = {0.0: 0, 0.1: 1, 0.001: 1, 1.0: 10, 2.5: 25, 0.7: 7}
    assert {epochs: make_warmup(digits().changed(warmup_epochs=epochs), 10).steps for epochs in steps} == steps


def test_a_rate_that_still_rises_is_no_reason_to_call_a_net_stuck(monkeypatch):
    for warmup, expected in ((0, 1), (200, 0), (90, 1)):
        worker = test_worker.make_worker("cpu", 0, of=lambda step: math.log(10), warmup=warmup, monkeypatch=monkeypatch)
        worker.train_epoch(0)
        warned = [event for event in worker.link.events if isinstance(event, test_worker.Warned)]
        assert len(warned) == expected, warmup


def test_the_rate_that_is_shown_is_that_of_the_next_update(monkeypatch):
    worker = test_worker.make_worker("cpu", 7, warmup=20, monkeypatch=monkeypatch)
    assert worker.lr == pytest.approx(0.01 * 8 / 20)
