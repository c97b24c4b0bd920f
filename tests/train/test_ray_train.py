"""What is relied on in Ray Train: private names, which checkpoint is the best, and a kill at the last moment."""

import ast
import asyncio
import importlib
import re
import threading
from types import SimpleNamespace

import pytest
import ray
import ray.train
from conftest import ROOT
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from orchestrator.base.exits import JobError
from orchestrator.base.ray_internals import SUPPORTED_RAY, require
from orchestrator.train import ray_train, ray_train_internals
from orchestrator.train.ray_train import RayTrainRun
from orchestrator.train.ray_train_internals import INTERNALS
from orchestrator.train.session import best_of


def planted(entry, monkeypatch, change):
    """Replace the name that an entry of the table describes."""
    *path, last = entry.name.split(".")
    owner = importlib.import_module(entry.module)
    for part in path:
        owner = getattr(owner, part)
    if change is None:
        monkeypatch.setattr("orchestrator.base.ray_internals.getattr", hides(owner, last), raising=False)
    else:
        monkeypatch.setattr(owner, last, change)


def hides(owner, name):
    def found(where, wanted, *default):
        if where is owner and wanted == name:
            raise AttributeError(wanted)
        return getattr(where, wanted, *default)

    return found


def refusal():
    with pytest.raises(JobError) as error:
        require(SUPPORTED_RAY, INTERNALS)
    assert "\n" not in str(error.value)
    assert f"only Ray {SUPPORTED_RAY} is supported" in str(error.value)
    return str(error.value)


NAMES = [entry for entry in INTERNALS if "modified_class" not in entry.name]


@pytest.mark.parametrize("entry", NAMES, ids=lambda entry: entry.name)
def test_every_private_name_that_is_missing_is_named(entry, monkeypatch):
    planted(entry, monkeypatch, None)
    assert f"{entry.module}.{entry.name} is missing" in refusal()


@pytest.mark.parametrize("entry", [e for e in NAMES if e.parameters is not None], ids=lambda entry: entry.name)
def test_every_private_name_whose_parameters_have_changed_is_named(entry, monkeypatch):
    planted(entry, monkeypatch, lambda self, a_new_one: None)
    expected = f"{entry.module}.{entry.name}(self, a_new_one) should be ({', '.join(entry.parameters)})"
    assert expected in refusal()


@pytest.mark.parametrize(
    ("entry", "attribute"),
    [(entry, name) for entry in INTERNALS for name in entry.attributes],
    ids=lambda found: found if isinstance(found, str) else found.name,
)
def test_every_private_attribute_that_is_not_set_any_more_is_named(entry, attribute, monkeypatch):
    others = "".join(f"; self.{name} = 0" for name in entry.attributes if name != attribute)
    made: dict = {}
    exec(f"class Changed:\n def __init__(self, {', '.join(entry.parameters)}): 0{others}", made)
    planted(entry, monkeypatch, made["Changed"])
    assert f"{entry.module}.{entry.name} has no attribute {attribute}" in refusal()


def test_the_barrier_s_parameters_are_checked(monkeypatch):
    entry = next(entry for entry in INTERNALS if "modified_class" in entry.name)
    monkeypatch.setattr(
        ray_train.SynchronizationActor.__ray_metadata__, "modified_class", lambda timeout_s, another: None
    )
    assert f"{entry.name}(timeout_s, another) should be (timeout_s, warn_interval_s)" in refusal()


def test_another_ray_is_refused_when_the_file_is_imported(monkeypatch):
    monkeypatch.setattr(ray, "__version__", "9.9.9")
    with pytest.raises(JobError, match=r"^Ray 9\.9\.9 is installed, and only Ray 2\.60\.0 is supported; install it"):
        importlib.reload(ray_train_internals)


def test_the_names_are_checked_before_they_are_imported():
    with open(ray_train.__file__) as file:
        tree = ast.parse(file.read())
    order = [
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    ]
    assert order.index("orchestrator.train") < min(order.index(name) for name in order if name.startswith("ray"))


# which checkpoint is the best


def keep(folder, errors):
    """What Ray Train keeps of checkpoints with these errors: names, best first by its own order, and its snapshot's."""
    storage = StorageContext(str(folder), "run")
    config = ray.train.CheckpointConfig(
        num_to_keep=1, checkpoint_score_attribute="val/top1_error", checkpoint_score_order="min"
    )

    async def report():
        manager = CheckpointManager(config, storage)
        for epoch, error in errors:
            name = f"checkpoint-epoch-{epoch:04d}"
            (folder / "run" / name).mkdir(parents=True)
            checkpoint = ray.train.Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)
            manager.register_checkpoint(
                _TrainingReport(checkpoint=checkpoint, metrics={"val/top1_error": error}, validation=False)
            )
            await asyncio.sleep(0)
        return manager

    manager = asyncio.run(report())
    return ray.train.Result._from_checkpoint_manager(manager, storage)


@pytest.mark.parametrize(
    "errors",
    [
        [0.5, 0.3, 0.3, 0.4],
        [0.3, 0.3, 0.3],
        [0.5, 0.4, 0.3],
        [0.3, 0.4, 0.5, 0.3],
        [0.1 + 0.2, 0.3, 0.1 + 0.2],  # not equal: the sum is larger
        [0.0, 0.5, 0.0, 0.5],
    ],
)
@pytest.mark.parametrize("interrupted_after", [0, 1, 2])
def test_the_best_of_a_history_is_the_epoch_whose_checkpoint_ray_keeps(tmp_path, errors, interrupted_after):
    reports = list(enumerate(errors, start=1))
    for part in (reports[:interrupted_after], reports[interrupted_after:]):
        if part:
            result = keep(tmp_path, part)
    best = result.get_best_checkpoint("val/top1_error", "min")
    history = [{"epoch": epoch, "val/top1_error": error} for epoch, error in reports]
    assert best.path.endswith(f"checkpoint-epoch-{best_of(history)['epoch']:04d}")
    kept = {folder.name for folder in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-epoch-{epoch:04d}" for epoch in (best_of(history)["epoch"], len(errors))}


# a kill at the last moment


def test_a_run_that_ends_while_it_is_killed_is_no_error():
    """Between the question whether it is over, and the cancellation of its task, its loop may close."""
    removed = []
    run = RayTrainRun.__new__(RayTrainRun)
    run._controller = SimpleNamespace(
        free_resources=lambda: None, remove_placement_group=lambda: removed.append(True), pool=None
    )
    run._error, run._loop, may_end = None, asyncio.new_event_loop(), asyncio.Event()

    class EndsMeanwhile(threading.Event):
        def is_set(self):
            if threading.current_thread() is not run._thread and not super().is_set():
                run._loop.call_soon_threadsafe(may_end.set)
                run._thread.join(30)
                assert run._loop.is_closed()
                return False
            return super().is_set()

    run._over = EndsMeanwhile()
    run._task = run._loop.create_task(may_end.wait())
    run._thread = threading.Thread(target=run._run, daemon=True)
    run._thread.start()
    run.kill()
    assert removed == [True]
    assert run._error is None
    run.kill()  # and once it is over, nothing
    assert removed == [True]


def test_a_run_is_killed_in_the_midst_of_its_loop():
    run, freed = RayTrainRun.__new__(RayTrainRun), []
    run._controller = SimpleNamespace(
        free_resources=lambda: freed.append(True), remove_placement_group=lambda: None, pool=None
    )
    run._error, run._over, run._loop = None, threading.Event(), asyncio.new_event_loop()
    run._task = run._loop.create_task(asyncio.sleep(1000))
    run._thread = threading.Thread(target=run._run, daemon=True)
    run._thread.start()
    run.kill()
    assert run.wait(0)
    assert (freed, run._error) == ([True], None)


def test_every_private_name_in_use_is_in_the_checklist():
    listed = (ROOT / "docs" / "upgrading-ray.md").read_text()
    for entry in INTERNALS:
        name = entry.name.removesuffix(".__ray_metadata__.modified_class")
        assert f"`{name}`" in listed, name
        assert not [attribute for attribute in entry.attributes if f"`{attribute}`" not in listed]
    checked = {entry.module for entry in INTERNALS}
    for path in (*(ROOT / "orchestrator" / "train").glob("*.py"), *(ROOT / "orchestrator" / "search").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and re.search(r"^ray\..*\b_(internal|private)\b", node.module or ""):
                modules = {node.module} | {f"{node.module}.{name.name}" for name in node.names}
                assert modules & checked, f"{path}: {node.module} is in no table"
