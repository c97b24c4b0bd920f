"""A checkpoint that differs from its record is not believed."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import alexnet
from alexnet.layouts import Layout, ShardedNet
from orchestrator.config.recipes import digits
from orchestrator.train import checkpoints, record
from orchestrator.train.model import build_net

MADE, SETTINGS = {"version": "1", "threads": 2}, {"lr": 0.01, "data": None, "workers": [1, 2]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sealed checkpoint, with velocities."""
    folder = tmp_path_factory.mktemp("checkpoint") / "checkpoint-epoch-0001"
    folder.mkdir()
    net = ShardedNet(build_net(digits().changed(width=0.0625), 10), Layout("single", 1))
    optimizer = alexnet.PaperSGD(net.parameters(), lr=0.01)
    net.part(torch.zeros(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    state = checkpoints.State(epoch=1, step=7, history=[{"epoch": 1, "val/top1_error": 0.5}])
    checkpoints.save(folder, net, optimizer, alexnet.plateau_schedule(optimizer), state)
    (folder / "net.json").write_text(json.dumps({"preset": "paper", "classes": [str(number) for number in range(40)]}))
    record.seal(folder, MADE, SETTINGS)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / whole.name)


def test_a_whole_checkpoint_is_what_its_record_says(folder):
    found = record.verify(folder)
    assert found is not None
    assert set(found.files) == {"model.safetensors", "velocity.safetensors", "state.json", "net.json"}
    assert found.files["net.json"].bytes == (folder / "net.json").stat().st_size
    assert (found.made, found.settings) == (MADE, SETTINGS)
    assert record.read(folder) == found


FILES = ("model.safetensors", "velocity.safetensors", "state.json", "net.json")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_and_the_file_named(folder, name):
    """Every byte of what is JSON, one in 4 KB and the header of tensors."""
    path = folder / name
    data = bytearray(path.read_bytes())
    step = 1 if name.endswith(".json") else 4096
    places = sorted({*range(0, len(data), step), len(data) - 1})
    random = np.random.default_rng(0)
    for place in places:
        data[place] ^= (bit := 1 << int(random.integers(8)))
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged: its SHA-256 .*; resume from another"):
            record.verify(folder)
        data[place] ^= bit
    path.write_bytes(data)
    assert record.verify(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_cut_file_is_found_and_named(folder, name, kept):
    path = folder / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: damaged: has .* bytes, and {size:,} were written"):
        record.verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: is missing; resume from another checkpoint"):
        record.verify(folder)


def test_a_file_more_is_nobody_s_business(folder):
    (folder / "notes.txt").write_text("mine")
    assert record.verify(folder)


def test_a_checkpoint_without_a_record_was_broken_off_unless_it_is_older(folder):
    (folder / record.RECORD).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-epoch-0001: has no record\.json, so it was broken off"):
        record.verify(folder)
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    assert record.verify(folder) is None


def test_every_flip_in_the_record_itself_is_found_or_changes_no_sum(folder):
    path = folder / record.RECORD
    data, wanted = bytearray(path.read_bytes()), record.read(folder)
    found = 0
    for place in range(len(data)):
        data[place] ^= 1
        path.write_bytes(data)
        data[place] ^= 1
        said = None
        try:
            read = record.verify(folder)
        except ValueError as error:
            said = str(error)
        assert "\n" not in (said or "")
        assert said or read.files == wanted.files, "a name or a sum was changed, and believed"
        found += said is not None
    assert found > len(data) / 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[1]", "is not JSON"),
        ('{"schema_version": 9}', "newer version"),
        ('{"schema_version": 1}', "damaged: files: Field required"),
        ('{"schema_version": 1, "files": {"a": {"bytes": -1, "sha256": "x"}}, "made": {}}', r"damaged: files\.a\."),
    ],
)
def test_a_record_that_is_none_is_said_in_one_line(folder, text, words):
    (folder / record.RECORD).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        record.verify(folder)
    assert "\n" not in str(error.value)
    assert record.RECORD in str(error.value)
