"""What a run asks of a cluster, its folder, its checkpoints, its progress lines."""

import io

import pytest
import torch

import alexnet
from orchestrator import checkpoints
from orchestrator.exits import JobError
from orchestrator.progress import LiveLine, TrainView, duration
from orchestrator.recipes import digits
from orchestrator.runs import RunFolder
from orchestrator.session import resumed
from orchestrator.trainer import share_cpus
from orchestrator.worker import build_net, wants_bf16


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16, 96])
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 64])
def test_workers_and_every_worker_s_feed_fit_at_once(cpus, workers):
    share = share_cpus(cpus, 0, workers)
    assert share.worker_cpus > 0
    assert share.feed_cpus > 0
    assert workers * (share.worker_cpus + share.feed_tasks * share.feed_cpus) <= cpus + 1e-9


def test_gpus_are_used_when_there_is_one_for_each_worker_and_never_silently_left():
    assert share_cpus(16, 2, 2).use_gpu
    assert not share_cpus(16, 0, 2).use_gpu
    with pytest.raises(JobError, match="--workers 4: the cluster has 2 GPU"):
        share_cpus(16, 2, 4)
    with pytest.raises(JobError, match="has 0 GPU"):
        share_cpus(16, 0, 1, "gpu")
    assert not share_cpus(16, 1, 2, digits().device).use_gpu  # make train on a machine with one GPU
    with pytest.raises(JobError, match="no CPUs"):
        share_cpus(0, 0, 1)


def test_a_run_folder_is_never_taken_twice(tmp_path):
    run = RunFolder(tmp_path, "first")
    run.create(digits())
    assert run.config() == digits()
    with pytest.raises(ValueError, match="--resume first"):
        run.create(digits())
    with pytest.raises(ValueError, match="it has: first"):
        RunFolder(tmp_path, "second").config()
    for wrong in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="letters, digits"):
            RunFolder(tmp_path, wrong)


def test_a_run_that_goes_on_keeps_what_its_checkpoint_has():
    config = digits()
    assert resumed(config, {"epochs": 40, "lr": config.lr}).epochs == 40
    with pytest.raises(ValueError, match="--lr: cannot change when a run is resumed, only --epochs"):
        resumed(config, {"lr": 0.5})


def trained(steps, net, optimizer):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(4, 3, 64, 64, generator=generator)).square().mean().backward()
        optimizer.step()


def pieces():
    net = build_net(digits(), 10).eval()  # no dropout: this is about state
    optimizer = alexnet.PaperSGD(net.parameters(), lr=0.01)
    return net, optimizer, alexnet.plateau_schedule(optimizer, patience=1)


def test_six_steps_equal_three_saved_and_loaded_and_three_bit_for_bit(tmp_path):
    net, optimizer, schedule = pieces()
    trained(3, net, optimizer)
    for error in (0.5, 0.5, 0.5):
        schedule.step(error)
    state = checkpoints.State(epoch=3, step=3, history=[{"epoch": 1, "val/top1_error": 0.5}])
    checkpoints.save(tmp_path, net, optimizer, schedule, state)
    again, optimizer2, schedule2 = pieces()
    assert checkpoints.load(tmp_path, again, optimizer2, schedule2) == state
    assert optimizer2.param_groups[0]["lr"] == pytest.approx(0.001)  # the dropped rate, not the config's
    for pair in ((net, optimizer), (again, optimizer2)):
        trained(3, *pair)
    for (name, a), b in zip(net.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert schedule.state_dict() == schedule2.state_dict()


def test_a_checkpoint_holds_the_canonical_names_and_nothing_pickled(tmp_path):
    from safetensors import safe_open

    net, optimizer, schedule = pieces()
    trained(1, net, optimizer)
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "state.json", "velocity.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(net.state_dict())
        assert torch.equal(file.get_tensor("conv2.weight"), net.conv2.weight)


def test_precision_is_what_was_asked_for_and_auto_never_guesses_on_other_devices():
    assert wants_bf16("bf16", torch.device("cpu"))
    assert not wants_bf16("fp32", torch.device("cpu"))
    assert not wants_bf16("auto", torch.device("mps"))


def test_a_log_gets_plain_lines_and_a_terminal_one_live_line():
    step = {"kind": "step", "epoch": 0, "epochs": 2, "step": 1, "steps": 4, "loss": 2.0, "images_per_s": 10.0}
    log = io.StringIO()
    view = TrainView()
    view.line = LiveLine(log)
    for number in range(1, 4):
        view.event(step | {"step": number})
    assert log.getvalue() == "epoch 1/2  step 1/4  loss 2.0000  10 images/s  ETA --:--\n"  # one, not three in a moment
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    view.line = LiveLine(terminal)
    view.event(step | {"step": 4})
    view.line.print("done")
    assert terminal.getvalue().startswith("\r")
    assert terminal.getvalue().endswith("\r\x1b[2Kdone\n")


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (5, 65, 3605)] == ["0:05", "1:05", "1:00:05"]
