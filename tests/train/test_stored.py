"""What a run's next session believes of the checkpoints that are stored."""

import json

import pytest
import ray
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from orchestrator.base.exits import JobError
from orchestrator.config.recipes import digits
from orchestrator.train import record, session, stored
from orchestrator.train.checkpoints import checkpoint_name
from orchestrator.train.run_folder import RunFolder
from orchestrator.train.stored import NEVER_BEST, SNAPSHOT, Stored, ray_list, restore_list


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path, "run")
    (tmp_path / "run").mkdir()
    return folder


def store(run, epoch, error, step=0, version=2, settings=None):
    """A checkpoint as the workers write it, with few weights."""
    folder = run.path.local / checkpoint_name(epoch, step)
    folder.mkdir()
    history = [{"epoch": number, "val/top1_error": error + epoch - number} for number in range(1, epoch + 1)]
    state = {"epoch": epoch, "step": 10 * epoch + step, "losses": [1.0] * step, "digest": "d", "history": history}
    (folder / "state.json").write_text(json.dumps({"schema_version": version, "state": state}))
    for name in ("model.safetensors", "velocity.safetensors"):
        (folder / name).write_bytes(name.encode() * 100)
    if version > 1:
        record.seal(folder, {"version": "0"}, settings or {})
    return folder


def restored(run):
    """Ray Train's list, and what was said."""
    said = []
    restore_list(run, said.append)
    path = run.path.local / SNAPSHOT
    return (json.loads(path.read_text()) if path.exists() else None), said


def managed(run):
    """What Ray Train makes of its list: names, the worst first, and the latest."""
    config = ray.train.CheckpointConfig(
        num_to_keep=1, checkpoint_score_attribute="val/top1_error", checkpoint_score_order="min"
    )
    manager = CheckpointManager(config, StorageContext(str(run.output.local), "run"))
    names = [each.checkpoint.path.rpartition("/")[2] for each in manager._checkpoint_results]
    return names, manager._latest_checkpoint_result.checkpoint.path.rpartition("/")[2], manager


def test_ray_reads_the_list_as_its_own(run):
    store(run, 2, 0.3), store(run, 3, 0.3), store(run, 4, 0.5), store(run, 4, 0.5, step=7)
    found, said = restored(run)
    assert said == []
    names, latest, manager = managed(run)
    assert names == [checkpoint_name(4, 7), checkpoint_name(4), checkpoint_name(2), checkpoint_name(3)]
    assert latest == checkpoint_name(4, 7)
    assert json.loads(manager._save_state()) == found
    assert found["checkpoint_results"][0]["metrics"] == {"val/top1_error": NEVER_BEST}


@pytest.mark.parametrize("snapshot", [None, "", "{", json.dumps(ray_list([Stored("checkpoint-epoch-0009", 0)]))])
def test_a_list_that_is_missing_damaged_or_wrong_is_made_again(run, snapshot):
    store(run, 1, 0.5)
    if snapshot is not None:
        (run.path.local / SNAPSHOT).write_text(snapshot)
    restored(run)
    assert managed(run)[:2] == ([checkpoint_name(1)], checkpoint_name(1))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors: damaged: its SHA-256"),
        (lambda folder: flip(folder / "state.json"), "state.json: damaged"),
        (lambda folder: (folder / "velocity.safetensors").write_bytes(b""), "damaged: has 0 bytes"),
        (lambda folder: (folder / "velocity.safetensors").unlink(), "velocity.safetensors: is missing"),
        (lambda folder: (folder / "record.json").unlink(), "broken off while it was written"),
        (lambda folder: (folder / "record.json").write_text("{"), "record.json: is not JSON"),
        (lambda folder: (folder / "state.json").unlink(), "has no state.json"),
    ],
)
def test_the_newest_whole_one_is_taken_and_the_damaged_one_told_and_kept(run, damage, words):
    store(run, 2, 0.3)
    newest = store(run, 3, 0.2)
    damage(newest)
    found, said = restored(run)
    assert managed(run)[:2] == ([checkpoint_name(2)], checkpoint_name(2))
    [line] = said
    assert words in line
    assert line.endswith("; it is not used, and now called damaged-checkpoint-epoch-0003")
    assert "\n" not in line
    assert not newest.exists()
    assert (run.path.local / "damaged-checkpoint-epoch-0003").is_dir()
    assert restored(run) == (found, []), "told once"
    again = store(run, 3, 0.2)
    damage(again)
    assert restored(run)[1][0].endswith("now called damaged-checkpoint-epoch-0003-2")


def test_where_none_is_whole_the_run_does_not_begin_anew_in_silence(run):
    folder = store(run, 3, 0.2)
    restored(run)
    flip(folder / "model.safetensors")
    said = []
    with pytest.raises(JobError, match=r"^run run: none of its checkpoints is whole; start a new run"):
        restore_list(run, said.append)
    assert len(said) == 1


@pytest.mark.parametrize("missing", ["record.json", "state.json", "model.safetensors"])
def test_a_first_checkpoint_that_was_broken_off_is_no_loss(run, missing):
    """The worker was killed while it was copied, in any order of its files: Ray Train has no list yet."""
    (store(run, 1, 0.2) / missing).unlink()
    found, said = restored(run)
    assert found is None
    assert len(said) == 2
    assert said[1] == "no checkpoint was completed before: the run begins anew"
    assert restored(run) == (None, [])


def test_a_run_from_before_there_were_records_keeps_its_list(run):
    store(run, 1, 0.5, version=1)
    (run.path.local / SNAPSHOT).write_text("Ray's own")
    restore_list(run)
    assert (run.path.local / SNAPSHOT).read_text() == "Ray's own"
    store(run, 2, 0.6)  # it was resumed since
    restored(run)
    assert managed(run)[:2] == ([checkpoint_name(2), checkpoint_name(1)], checkpoint_name(2))


def test_a_run_without_checkpoints_has_no_list(run):
    assert restored(run) == (None, [])


def test_in_object_storage_sizes_are_compared(run):
    folder = store(run, 2, 0.4)
    place = run.path / folder.name
    assert stored._sizes(place) == record.read(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged: has 5 bytes, and 1,700 were written$"):
        stored._sizes(place)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: is missing$"):
        stored._sizes(place)
    (folder / "record.json").unlink()
    with pytest.raises(ValueError, match="broken off"):
        stored._sizes(place)


def cut(text):
    return "".join(text.splitlines(keepends=True)[: len(text.splitlines()) // 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, r"config\.yaml: damaged: has no \w+; restore it: the settings that checkpoint-epoch-0001 was made with"),
        (lambda text: text.replace("lr: 0.01", "lr: 0.02"), r"lr is 0\.02, and was 0\.01: it cannot change"),
        (lambda text: text.replace("seed: 0", "seed: 1"), r"seed is 1, and was 0"),
        (lambda text: "", "expected lines of the form"),
    ],
)
def test_settings_that_are_not_those_of_the_checkpoint_are_refused(run, change, words):
    config = digits()
    run.change(config)
    assert session.settings_of(run) == config, "no checkpoint yet"
    store(run, 1, 0.5, settings=config.model_dump(mode="json"))
    assert session.settings_of(run) == config
    run.change(config.changed(epochs=config.epochs + 2))  # which may change
    assert session.settings_of(run).epochs == config.epochs + 2
    path = run.path.local / "config.yaml"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=words) as error:
        session.settings_of(run)
    assert "\n" not in str(error.value)


def test_settings_of_before_a_field_was_there_are_taken(run):
    config = digits()
    run.change(config)
    settings = config.model_dump(mode="json")
    del settings["augment_on"]
    store(run, 1, 0.5, settings=settings)
    assert session.settings_of(run) == config
