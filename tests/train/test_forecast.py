"""The speed that a dry run takes from earlier runs."""

import json
import logging
import os
import re
from types import SimpleNamespace

import pytest
import yaml
from conftest import started

from alexnet.cost import estimate
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import adapted, digits
from orchestrator.train.forecast import SPEED_SETTINGS, Machines, describe, measured_rate, time_and_cost
from orchestrator.train.run_folder import RunFolder

OTHER = {
    "data": "shards/x", "preset": "caffe", "width": 0.5, "input_size": 96, "global_batch_size": 32, "workers": 4,
    "layout": "data", "device": "gpu", "precision": "bf16", "threads": 3, "freeze": "conv1", "accumulate": 2,
    "augment_on": "device",
}  # fmt: skip


@pytest.fixture
def output(tmp_path):
    return StoragePath.of(tmp_path)


def earlier(output, name, rate, written, status="FINISHED", **settings):
    run = RunFolder(output, name)
    config = digits().model_dump() | settings
    run.write_result({"status": status, "config": config, "images_per_s": rate})
    os.utime(output.local / name / "result.json", (written, written))


def test_the_newest_finished_run_counts_whatever_its_name(output):
    assert measured_rate(digits(), output) is None
    earlier(output, "b", 200.0, written=2000)
    earlier(output, "a", 100.0, written=1000)
    earlier(output, "c", 300.0, written=1500)
    assert measured_rate(digits(), output) == (200.0, "b")
    for status in ("RUNNING", "FAILED", "KILLED", None):
        earlier(output, "later", 900.0, written=3000, status=status)
        assert measured_rate(digits(), output) == (200.0, "b"), status
    earlier(output, "later", 900.0, written=3000)
    assert measured_rate(digits(), output) == (900.0, "later")


@pytest.mark.parametrize(
    ("preset", "net", "parameters"),
    [
        ("paper", "the two-column net of the paper; 64 pixels, LRN k 2, n 5, alpha 0.0001, beta 0.75", "1,279,082"),
        ("caffe", "Caffe's replication, BVLC AlexNet; 64 pixels, LRN k 1, n 5, alpha 2e-05, beta 0.75", "1,279,082"),
        ("torchvision", "torchvision's, of one column and without LRN; 64 pixels, no LRN", "3,579,098"),
    ],
)
def test_the_description_of_a_run_has_its_net_its_size_and_the_layouts_it_can_have(output, preset, net, parameters):
    config = adapted(digits(), {"preset": preset}).changed(preset=preset)
    facts = dict(re.findall(r"^  (\S+(?: \w+)?)\s{2,}(.*)$", describe(config, output, None), re.M))
    assert facts["net"] == f"{preset}: {net}"
    assert facts["parameters"] == parameters
    assert {name.split()[1] for name in facts if name.startswith("layout ")} == (
        {"data", "columns", "hybrid"} if preset == "paper" else {"data", "hybrid"}
    )


def test_memory_follows_the_parts_of_a_batch_and_an_average_is_one_more_copy_of_the_weights(output):
    def facts(**changes):
        text = describe(
            digits().changed(workers=1, layout="single", global_batch_size=1024, **changes), output, None, "digits"
        )
        return dict(re.findall(r"^  (\S+(?: \w+)?)\s{2,}(.*)$", text, re.M))

    plain, parts, averaged = facts(), facts(accumulate=8), facts(accumulate=8, ema=0.9)
    small = estimate(num_classes=10, input_size=64, width=0.25, global_batch_size=128)
    assert plain["memory"].endswith("parameters, and activations")
    assert parts["memory"].startswith(
        f"{small.memory_bytes / 1e9:.2f} GB per worker: weights, gradients and velocities"
    )
    assert parts["memory"].endswith("and activations of 128 images at a time")
    more = f"{(small.memory_bytes + 4 * 1_279_082) / 1e9:.2f} GB per worker: weights, their average, gradients"
    assert averaged["memory"].startswith(more)
    assert (parts["checkpoint"][:5], averaged["checkpoint"][:5]) == ("10 MB", "15 MB")
    assert plain["steps"] == parts["steps"] == "2 per epoch, 60 in total"
    assert plain["rate"].startswith("linear scaling (Goyal et al. 2017) suggests --lr 0.16 for a batch of 1024 where")
    assert plain["layout single"].split()[0] > parts["layout single"].split()[0]


@pytest.mark.parametrize("workers", ["2", " 2 ", "2..2", 2, 2.0])
def test_a_run_with_the_same_workers_counts_however_they_were_written(output, workers):
    earlier(output, "before", 123.0, written=1000, workers=workers)
    assert measured_rate(digits().changed(workers="2"), output) == (123.0, "before")


def test_a_run_of_other_settings_does_not_count(output):
    assert set(OTHER) == set(SPEED_SETTINGS)
    for name, value in OTHER.items():
        earlier(output, "before", 123.0, written=1000, **{name: value})
        assert measured_rate(digits(), output) is None, name
    earlier(output, "before", 123.0, written=1000, lr=0.5, seed=7, epochs=2)
    assert measured_rate(digits(), output) == (123.0, "before")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b"3",
        b'{"status": "FINISHED"}',
        b'{"status": "FINISHED", "config": []}',
        b'{"status": "FINISHED", "config": {"lr": -1}}',
        b'{"status": "FINISHED", "config": {"no_such_setting": 1}}',
        *(f'{{"status": "FINISHED", "config": CONFIG, "images_per_s": {rate}}}'.encode()
          for rate in ("0", "-5", "NaN", "Infinity", '"fast"', "true", "null")),
    ],
)  # fmt: skip
def test_a_result_that_cannot_be_read_is_skipped_with_one_line(output, text, caplog):
    earlier(output, "good", 100.0, written=1000)
    (output / "broken").local.mkdir()
    config = json.dumps(digits().model_dump()).encode()
    (output / "broken" / "result.json").local.write_bytes(text.replace(b"CONFIG", config))
    with caplog.at_level(logging.WARNING):
        assert measured_rate(digits(), output) == (100.0, "good")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{output}/broken/result.json: skipped for the forecast: ")
    assert "\n" not in record.getMessage()


def test_what_is_not_a_run_is_skipped_silently(output, caplog):
    earlier(output, "good", 100.0, written=1000)
    (output / "search").local.mkdir()
    search = {"status": "FINISHED", "trials": [], "config": {"num_samples": 3}}
    (output / "search" / "result.json").local.write_text(json.dumps(search))
    (output / "a folder").local.mkdir()
    (output / "result.json").local.write_text("{")
    assert measured_rate(digits(), output) == (100.0, "good")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_time_of_a_dry_run_has_the_start_up_of_the_run_whose_speed_it_takes(output):
    config, stated = digits(), None
    earlier(output, "before", 1437 + 120, written=1000)

    def time_of(**search):
        cost, machines = (
            estimate(num_classes=10, input_size=64, width=0.25, global_batch_size=64),
            Machines([], None, "", 36.0),
        )
        data = SimpleNamespace(rows={"train": 1437, "val": 360})
        return dict(time_and_cost(config, output, data, 30, machines, cost, 1, stated, **search))

    assert time_of()["time"] == "about 0:30 for 30 epochs, not counting start-up"
    run = RunFolder(output, "before")
    run.write_result(run.result() | {"startup_s": 12.4})
    assert time_of()["time"] == "about 0:42 for 30 epochs, with 0:12 of start-up as in run before"
    assert time_of()["cost"].startswith("about $0.42,")
    assert time_of(at_once=2)["time"] == "about 0:30 for 30 epochs, not counting start-up"
    stated = 2 * 1557.0
    assert time_of()["time"] == "about 0:27 for 30 epochs, with 0:12 of start-up as in run before"
    for damaged in ("fast", True, -1, None):
        run.write_result(run.result() | {"startup_s": damaged})
        assert time_of()["time"] == "about 0:15 for 30 epochs, not counting start-up"


def test_a_dry_run_names_the_run_whose_speed_it_takes(tmp_path, monkeypatch, capsys):
    output = StoragePath.of(tmp_path / "runs")
    earlier(output, "before", 1437 + 120, written=1000)
    (output / "broken" / "result.json").write(b"{")
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(digits().model_dump() | {"workers": "2"}))
    for flags in (["--workers", "2"], ["--config", "old.yaml"]):
        status, out, err = started("train", ["--dry-run", *flags], tmp_path, monkeypatch, capsys)
        assert (status, "Traceback" in err) == (0, False)
        assert "1,557 images/s: measured in run before" in out
        assert "about 0:30 for 30 epochs, not counting start-up" in out
