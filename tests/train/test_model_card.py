"""What is said of a run and its model: right figures, no markup of others, no secrets."""

from types import SimpleNamespace

import pytest

from orchestrator.base.markdown import code, code_block, escaped
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.config.train import make_config
from orchestrator.search.config import make_search
from orchestrator.search.journal import TrialRecord
from orchestrator.search.notes import search_note, trial_note
from orchestrator.tracking.note import note
from orchestrator.tracking.run import Run
from orchestrator.tracking.store import Store
from orchestrator.train.model_card import data_line, how_it_ended, model_card, repeating, run_note

HOSTILE = "a|b <script>x</script> [l](http://e.x) `c` **d** # e\n# f"
ENTRY = {"epoch": 12, "val/top1_error": 3 / 360, "val/top5_error": 0.0, "val/loss": 0.1}
PLACE = StoragePath.of("/runs/my run")


def manifest(source="digits", classes=("0", "1")):
    return SimpleNamespace(
        source=source, digest="0123456789abcdef", classes=classes, class_names=(), exif="", image_size=72,
        rows={"train": 1437, "val": 360},
    )  # fmt: skip


def test_text_of_others_is_no_markup():
    line = escaped(HOSTILE)
    assert "\n" not in line
    for mark in "|<>[]`*#:":
        assert all(line[i - 1] == "\\" for i, each in enumerate(line) if each == mark), mark
    assert escaped("a_b www.x.y") == r"a\_b www\.x.y"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a") == "`` `a ``"
    assert code_block("x\n```\ny") == "````\nx\n```\ny\n````"


def test_a_card_has_data_errors_settings_and_use():
    card = model_card(
        digits(), manifest(), ENTRY, run_id="r1", checkpoint=PLACE / "checkpoint-epoch-0012", place=PLACE
    )  # fmt: skip
    for text in (
        "# my run\n",
        "for 2 classes, as it was after epoch 12.",
        "| top-1 | 0.83 % | 0.28 to 2.42 % |",
        "| top-5 | 0.00 % | 0.00 to 1.06 % |",
        "digits, digest `0123456789abcdef`: 2 classes, 1437 training and 360 validation images. Stored at 72 pixels.",
        "Classes: 0, 1.",
        "Licence of the data: not stated by the source",
        "alexnet.load('/runs/my run/checkpoint-epoch-0012')",
        'mlflow.pyfunc.load_model("runs:/r1/model")',
        "mlflow models serve -m runs:/r1/model --env-manager local --host 127.0.0.1",
        "--config '/runs/my run/config.yaml'",
        digits().to_yaml().strip(),
    ):
        assert text in card, text
    remote = StoragePath("s3://bucket/runs/one")
    far = model_card(digits(), manifest(), ENTRY, run_id="r1", checkpoint=remote / "checkpoint-epoch-0012", place=PLACE)
    assert "alexnet.load('s3:" not in far
    assert 'folder = mlflow.artifacts.download_artifacts("runs:/r1/model")\n' in far
    assert 'trained = alexnet.load(f"{folder}/artifacts/net")\n' in far
    many = model_card(
        digits(), manifest(HOSTILE, (HOSTILE, *map(str, range(60)))), ENTRY, run_id="r", checkpoint=PLACE, place=PLACE
    )  # fmt: skip
    assert " and 11 more." in many
    assert "<script>" not in many


def test_no_secret_is_in_a_card_or_a_note():
    address = "s3://bucket/shards?secret_key=se-cret"
    config = make_config(**digits().model_dump() | {"data": address})
    card = model_card(config, manifest(), ENTRY, run_id="r", checkpoint=PLACE, place=PLACE)
    assert "s3://bucket/shards?secret_key=***" in card
    text = card + note("", "", "", f"python jobs/tune.py --data {address}")
    assert "se-cret" not in text
    assert "python jobs/tune.py --data s3://bucket/shards" in text


@pytest.mark.filterwarnings("ignore")  # MLflow and its own dependencies warn about each other
def test_a_run_is_described_when_it_begins_and_when_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    run = Run(Store(f"sqlite:///{tmp_path / 'mlflow.db'}"))
    run.note = run_note(digits(), data_line(manifest()), PLACE, "running", 360)
    run.begin("one", "jobs/train.py", {})
    tags = run.client.get_run(run.run_id).data.tags
    assert tags["mlflow.user"] == "ada"
    assert tags["mlflow.note.content"] == (
        "AlexNet (paper, width 0.25, 64 pixels), trained for up to 30 epochs.\n\n"
        "**Data:** digits, digest `0123456789abcdef`: 2 classes, 1437 training and 360 validation images\n\n"
        "**Result:** running\n\n**Repeat it:**\n\n"
        "```\npython jobs/train.py --config '/runs/my run/config.yaml'\n```"
    )
    run.note = run_note(digits(), "", PLACE, how_it_ended("FAILED", "why *not*", 12), 360, ENTRY)
    run.finish("FAILED", "why *not*")
    found = run.client.get_run(run.run_id).data.tags["mlflow.note.content"]
    assert (
        r"**Result:** failed after 12 epochs (why \*not\*); best: top-1 error 0.83 % (0.28 to 2.42 %), top-5 error "
        "0.00 % (0.00 to 1.06 %) after epoch 12, of 360 validation images"
    ) in found


def test_a_search_and_its_trials_are_described():
    config = make_search({}, digits(), {"lr": {"loguniform": [0.001, 0.1]}})
    text = search_note(config, "data", "finished after 9 epochs", "python jobs/tune.py", {"best": 3})
    assert "A search over `lr`: " in text
    assert "**Result:** finished after 9 epochs; best trial: 3" in text
    assert "```\npython jobs/tune.py\n```" in text
    record = TrialRecord(3, {"lr": 0.02}, history=[ENTRY])
    text = trial_note(config, record, "running", "my_search", "data", 360, StoragePath.of("/runs/s/trials"))
    assert r"Trial 3 of the search my\_search: AlexNet (paper, width 0.25, 64 pixels) with `lr` 0.02." in text
    assert "best: top-1 error 0.83 % (0.28 to 2.42 %)" in text
    assert "--config /runs/s/trials/0003/config.yaml" in text


def test_a_run_that_started_from_a_net_is_repeated_from_it(tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "net.json").touch()
    place = StoragePath.of(tmp_path)
    assert repeating(place) == f"python jobs/train.py --config {tmp_path}/config.yaml --start-from {tmp_path}/start"
