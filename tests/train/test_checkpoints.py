"""A run resumes from its checkpoint bit for bit, in any layout."""

import json
import math
import shutil
import struct

import pytest
import safetensors.torch
import test_layouts
import torch
from conftest import ROOT
from gloo import run_gloo

import alexnet
from alexnet.dropout import BatchPosition
from alexnet.layouts import Layout, Partition, ShardedNet
from orchestrator.config.recipes import digits
from orchestrator.train import checkpoints
from orchestrator.train.model import build_net


def trained(steps, net, optimizer):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        images, where = torch.randn(4, 3, 64, 64, generator=generator), BatchPosition(0, step, torch.arange(4))
        net(images, where, [4]).square().mean().backward()
        optimizer.step()


def pieces():
    net = ShardedNet(build_net(digits(), 10), Layout("single", 1))
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


def test_a_checkpoint_of_another_net_is_refused_in_one_line(tmp_path):
    net, optimizer, schedule = pieces()
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    other = ShardedNet(build_net(digits(), 20), Layout("single", 1))
    with pytest.raises(ValueError, match=r"fc8\.\w+ is 10\b.* there, and 20\b.* in this net") as error:
        checkpoints.load(tmp_path, other, alexnet.PaperSGD(other.parameters()), schedule)
    assert "\n" not in str(error.value)


def test_a_rate_that_is_scaled_takes_the_velocities_with_it():
    """Weights taken at a high rate stay what they were under a low one."""
    moved = {}
    for factor in (1.0, 1e-4):
        net, optimizer, schedule = pieces()
        trained(3, net, optimizer)
        before = net.part.conv2.weight.detach().clone()
        checkpoints.scale_rate(factor, optimizer, schedule)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * factor)
        assert schedule.min_lrs == [pytest.approx(0.01 * 0.1**3 * factor)]
        trained(1, net, optimizer)
        moved[factor] = (net.part.conv2.weight - before).norm()
    assert moved[1e-4] < 2e-4 * moved[1.0]


def test_a_checkpoint_holds_the_canonical_names_and_nothing_pickled(tmp_path):
    from safetensors import safe_open

    net, optimizer, schedule = pieces()
    trained(1, net, optimizer)
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "state.json", "velocity.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(net.part.state_dict())
        assert torch.equal(file.get_tensor("conv2.weight"), net.part.conv2.weight)


CHANGES = [("columns", "hybrid"), ("hybrid", "data"), ("data", "columns")]


def save_and_resume(rank, root, workers, dtype):
    """Three steps in one layout, a checkpoint, and three more in another from it; for every change."""
    found = {}
    for first, then in CHANGES:
        folder, state = root / first, checkpoints.State(step=3)
        net, optimizer = test_layouts.make(rank, first, workers, dtype, 0.5)
        run(net, optimizer, range(3), dtype)
        if rank in net.layout.group_of(0):
            own = folder if rank == 0 else None
            checkpoints.save(own, net, optimizer, alexnet.plateau_schedule(optimizer), state)
        torch.distributed.barrier()
        net, optimizer = test_layouts.make(rank, then, workers, dtype, 0.5)
        assert checkpoints.load(folder, net, optimizer, alexnet.plateau_schedule(optimizer)) == state
        loaded = test_layouts.collected(net, dict(net.part.named_parameters()), "weight")
        run(net, optimizer, range(3, 6), dtype)
        later = test_layouts.collected(net, dict(net.part.named_parameters()), "weight")
        found[first] = {"loaded": loaded, "later": later}
    return found


def run(net, optimizer, steps, dtype):
    for step in steps:
        test_layouts.backward(net, step, dtype)
        optimizer.step()
        net.zero_grad()


@pytest.mark.slow
def test_any_layout_resumes_from_any_other_s_checkpoint(tmp_path):
    from safetensors.torch import load_file

    for first, _ in CHANGES:
        (tmp_path / first).mkdir()
    unbroken = test_layouts.alone(torch.float64, 0.5, 6)
    shapes = {name: list(t.shape) for name, t in test_layouts.build(torch.float64, 0.5).state_dict().items()}
    for first, found in run_gloo(4, save_and_resume, tmp_path, 4, torch.float64)[0].items():
        written = load_file(tmp_path / first / "model.safetensors")
        assert {name: list(tensor.shape) for name, tensor in written.items()} == shapes
        for name, tensor in written.items():
            assert torch.equal(tensor, found["loaded"][f"weight {name}"]), name
        for name, tensor in found["later"].items():
            assert test_layouts.difference(tensor, unbroken[name]) < 1e-10, (first, name)


def test_one_process_resumes_from_four_and_four_from_one(tmp_path):
    """The parts that each worker reads are those of the whole: no process group is needed to see it."""
    net, optimizer, schedule = pieces()
    trained(1, net, optimizer)
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    whole = dict(net.part.named_parameters())
    for kind, workers in (("columns", 2), ("hybrid", 4)):
        for rank in range(workers):
            part = ShardedNet.__new__(ShardedNet)
            torch.nn.Module.__init__(part)
            part.layout, part.rank, part.group_rank = Layout(kind, workers), rank, rank
            part.partition = Partition(net.part.preset, part.layout)
            read = dict(checkpoints.parts_of(tmp_path / "model.safetensors", part))
            assert read["conv4.weight"].shape[0] == (48 if kind == "columns" else 96)
            assert torch.equal(read["fc7.bias"], whole["fc7.bias"].chunk(workers)[rank])
            assert torch.equal(read["fc8.weight"], whole["fc8.weight"].chunk(workers, 1)[rank])
            assert torch.equal(read["fc8.bias"], whole["fc8.bias"])


def test_a_checkpoint_of_another_net_is_refused(tmp_path):
    net, optimizer, schedule = pieces()
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    del net.part.conv5
    with pytest.raises(ValueError, match=r"conv5\.bias is in the checkpoint or in the net, but not in both"):
        checkpoints.load(tmp_path, net, optimizer, schedule)
    whole = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(whole | {"a\n" * 5000: torch.zeros(1)}, tmp_path / "model.safetensors")
    net, optimizer, schedule = pieces()
    with pytest.raises(ValueError, match=r"safetensors: a.* is in the checkpoint") as error:
        checkpoints.load(tmp_path, net, optimizer, schedule)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_run_stopped_within_an_epoch_keeps_its_losses(tmp_path):
    net, optimizer, schedule = pieces()
    state = checkpoints.State(epoch=2, step=49, losses=[0.5, 0.25, 1 / 3])
    checkpoints.save(tmp_path, net, optimizer, schedule, state)
    assert checkpoints.load(tmp_path, net, optimizer, schedule) == state
    assert json.loads((tmp_path / "state.json").read_text())["state"]["losses"][2] == 1 / 3


def test_a_state_written_before_files_had_versions_is_read(tmp_path):
    """tests/samples/0.1/state.json: of a digits run that was stopped 18 steps into its fifth epoch."""
    net, optimizer, schedule = pieces()
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    shutil.copy(ROOT / "tests" / "samples" / "0.1" / "state.json", tmp_path / "state.json")
    state = checkpoints.load(tmp_path, net, optimizer, schedule)
    assert (state.epoch, state.step, len(state.losses), state.digest) == (4, 110, 18, "efc490ca8f16f6bf")
    assert state.losses[0] == 0.09667889028787613
    assert [entry["epoch"] for entry in state.history] == [1, 2, 3, 4]
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert schedule.best == state.history[-1]["val/top1_error"]


def test_a_state_has_a_version_and_a_newer_one_is_refused_before_anything_is_loaded(tmp_path):
    net, optimizer, schedule = pieces()
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    written = json.loads((tmp_path / "state.json").read_text())
    assert written["schema_version"] == 2
    (tmp_path / "state.json").write_text(json.dumps(written | {"schema_version": 3}))
    with torch.no_grad():
        net.part.fc8.bias.fill_(7.0)
    with pytest.raises(ValueError, match=r"state\.json: was written by a newer version .*reads up to 2") as error:
        checkpoints.load(tmp_path, net, optimizer, schedule)
    assert "\n" not in str(error.value)
    assert (net.part.fc8.bias == 7.0).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "is not JSON .nested too deeply"),
        ({"lr": "x"}, "damaged: lr is 'x'; expected 1 number"),
        ({"lr": [True]}, "damaged: lr is"),
        ({"schedule": None}, "damaged: schedule is None; expected the fields best, last_epoch, num_bad_epochs"),
        ({"schedule": {"best": "x", "num_bad_epochs": 0, "last_epoch": 1}}, "damaged: schedule.best is 'x'"),
        (
            {"schedule": {"best": 0.5, "num_bad_epochs": 0, "last_epoch": 1, "threshold_mode": "a\nb"}},
            r"damaged: schedule.threshold_mode is 'a\\nb'",
        ),
        ({"state": {"epoch": "x"}}, "damaged: state.epoch: Input should be a valid integer"),
        ({"state": None}, "damaged: state"),
    ],
)
def test_a_damaged_state_is_refused_in_one_line_that_names_file_and_field(tmp_path, text, words):
    net, optimizer, schedule = pieces()
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    path = tmp_path / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | text) if isinstance(text, dict) else text)
    with pytest.raises(ValueError, match=rf"^{path}: {words}.*resume from another checkpoint$") as error:
        checkpoints.load(tmp_path, net, optimizer, schedule)
    assert "\n" not in str(error.value)


def test_tensor_files_have_the_header_that_older_versions_wrote(tmp_path):
    """A length, then JSON of names to type, shape and offsets in the order of the net's parameters; no metadata."""
    net, optimizer, schedule = pieces()
    trained(1, net, optimizer)
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    for name in ("model.safetensors", "velocity.safetensors"):
        content = (tmp_path / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert length % 8 == 0
        header, end = json.loads(content[8 : 8 + length]), 0
        assert list(header) == [name for name, _ in net.part.named_parameters()]
        for key, param in net.part.named_parameters():
            begin, end = end, end + 4 * math.prod(param.shape)
            assert header[key] == {"dtype": "F32", "shape": list(param.shape), "data_offsets": [begin, end]}
        assert len(content) == 8 + length + end


def test_a_state_with_an_endless_name_ends_in_one_short_line(tmp_path):
    checkpoints.save(tmp_path, *pieces(), checkpoints.State())
    state = json.loads((tmp_path / "state.json").read_text())
    state["state"]["x\n" * 3000] = 1
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state.json: damaged: state.x\\nx") as error:
        checkpoints.load(tmp_path, *pieces())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model.safetensors", lambda data: data[:40], "cannot be read: .*; resume from another checkpoint"),
        ("model.safetensors", lambda data: b"\xff" * 8 + data[8:], "cannot be read: "),
        ("model.safetensors", lambda data: data.replace(b'"F32"', b'"I32"', 1), "is I32 of shape"),
        (
            "velocity.safetensors",
            lambda data: data.replace(b"conv1.bias", b"conv9.bias"),
            "'conv9.bias' is the velocity",
        ),
        ("velocity.safetensors", None, "cannot be read: No such file"),
    ],
)
def test_damaged_tensors_are_named_in_one_line(tmp_path, file, change, words):
    net, optimizer, schedule = pieces()
    trained(1, net, optimizer)
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink() if change is None else (tmp_path / file).write_bytes(change(data))
    with pytest.raises(ValueError, match=f"{file}: .*{words}") as error:
        checkpoints.load(tmp_path, *pieces())
    assert "\n" not in str(error.value)
