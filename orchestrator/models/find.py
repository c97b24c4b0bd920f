"""Finds a trained net by what a user calls it: a run, a search, a checkpoint, an address in MLflow, a weights file."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alexnet
from alexnet.trained import DESCRIPTION, MEAN_IMAGE, WEIGHTS, TrainedNet, write_description
from orchestrator.base.environment import default_output
from orchestrator.base.schema import load_json
from orchestrator.base.shown import quoted
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.data.dataset import BUNDLED, bundled, shards_of
from orchestrator.data.shards import MANIFEST, DamagedData, read_manifest, read_mean_image
from orchestrator.search.folder import SEARCH_YAML, TRIALS
from orchestrator.tracking import registry
from orchestrator.tracking.store import Store, tracking_uri, tracking_uri_of
from orchestrator.train.checkpoints import STATE
from orchestrator.train.model import describe
from orchestrator.train.run_folder import CHECKPOINT_PREFIX, CONFIG, RunFolder

WHAT = "the name of a run, its folder, a checkpoint, runs:/RUN_ID/model, models:/NAME@ALIAS, or a file of weights"


@dataclass(frozen=True)
class FoundModel:
    """A trained net that was found, on this machine's disk."""

    text: str  # what the user called it
    name: str  # for tables and file names
    path: Path  # what alexnet.load reads
    run: StoragePath | None = None  # the folder of its run
    kept: StoragePath | None = None  # where its run keeps weights; of a search's model, its best trial's folder
    data: str | None = None  # the shards that it was trained on, where its run says so
    mlflow_run_id: str | None = None
    mlflow_uri: str | None = None  # the store that has this run

    def load(self) -> TrainedNet:
        """Raises ValueError of one line."""
        return alexnet.load(self.path)


def find_model(text: str, into: Path, output: str | None = None) -> FoundModel:
    """Find the model that `text` names (WHAT); its best checkpoint, where it has several.

    into: a folder for what has to be fetched, which must last as long as the model is used. output: where runs are.
    Raises ValueError of one line.
    """
    if registry.is_address(text):
        return find_in_store(text, into, tracking_uri(), output)
    place = StoragePath.of(text)
    if place.local is not None and place.local.is_file():
        return FoundModel(text, place.local.stem, place.local)
    if not place.is_folder() and "/" not in text:
        place = StoragePath.of(output or default_output()) / text
    if not place.is_folder():
        known = _runs_in(place.parent)
        there = f"; {place.parent} has: {', '.join(known[-5:])}" if known else ""
        raise ValueError(f"MODEL {quoted(text)}: is not there; give {WHAT}{there}")
    if (place / WEIGHTS).size() is not None:
        return _of_checkpoint(text, place, into)
    if (place / SEARCH_YAML).size() is not None:
        return _of_search(text, place, into)
    if (place / CONFIG).size() is not None:
        return _of_run(text, place, into)
    raise ValueError(f"MODEL {quoted(text)}: {place} is neither a run nor a checkpoint; give {WHAT}")


def find_models(texts: list[str], into: Path, output: str | None = None) -> list[FoundModel]:
    """Several models, each with a name of its own. Raises ValueError of one line."""
    found: list[FoundModel] = []
    for number, text in enumerate(texts):
        model = find_model(text, into / str(number), output)
        names = {each.name for each in found}
        fresh = next(name for name in _names(model.name) if name not in names)
        found.append(FoundModel(**model.__dict__ | {"name": fresh}))
    return found


def _names(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def find_in_store(address: str, into: Path, uri: str, output: str | None = None) -> FoundModel:
    """The model of an address in one MLflow store, whose run may be gone. Raises ValueError of one line."""
    store = Store(uri)
    into.mkdir(parents=True, exist_ok=True)
    logged = registry.fetch(store, address, into)
    name = address.removeprefix("models:/").removeprefix("runs:/").replace("/", "-")
    found = registry.params_of(store, logged.run_id) if logged.run_id else None
    if found is None:
        return FoundModel(address, name, logged.folder, mlflow_uri=store.uri)
    data = found.get("data")
    if data == BUNDLED:
        data = str(bundled(StoragePath.of(output or default_output())))
    return FoundModel(
        address, name, logged.folder, data=data, mlflow_run_id=logged.run_id, mlflow_uri=store.uri
    )  # fmt: skip


def _of_search(text: str, place: StoragePath, into: Path) -> FoundModel:
    """The model of a search's best trial."""
    result = RunFolder(place.parent, place.name).result()
    best = next((trial for trial in result.get("trials") or [] if trial.get("number") == result.get("best")), None)
    if best is None:
        raise ValueError(f"MODEL {quoted(text)}: the search {place} has no best trial yet")
    number, epoch = best["number"], (best.get("best") or {}).get("epoch")
    trials = place / TRIALS
    folders = [name for name in sorted(trials.children(), reverse=True) if re.fullmatch(rf"{number:04d}(\D.*)?", name)]
    stored = [trials / folder / name for folder in folders for name in reversed(_checkpoints(trials / folder))]
    if not stored:
        raise ValueError(f"MODEL {quoted(text)}: the checkpoints of its best trial, {number}, are gone from {trials}")
    chosen = next((each for each in stored if each.name == f"{CHECKPOINT_PREFIX}{epoch:04d}"), stored[0])
    found = _of_checkpoint(text, chosen, into)
    uri = tracking_uri_of(result.get("mlflow_tracking_uri"))[0]
    data = found.data
    if data == str(bundled(trials)):  # which are kept with the search, not with its trials
        data = str(bundled(place.parent))
    return FoundModel(text, place.name, found.path, place, chosen.parent, data, best.get("mlflow_run_id"), uri)


def _of_run(text: str, place: StoragePath, into: Path) -> FoundModel:
    """The best checkpoint of a run, or its last if it has no best one."""
    checkpoints = _checkpoints(place)
    if not checkpoints:
        raise ValueError(f"MODEL {quoted(text)}: the run {place} has no checkpoint yet")
    result = RunFolder(place.parent, place.name).result()
    best = result.get("best") or _best_of_history(place / checkpoints[-1])
    epoch = best.get("epoch") if isinstance(best, dict) else None
    names = [f"{CHECKPOINT_PREFIX}{epoch:04d}"] if type(epoch) is int else []
    names.append(str(result.get("best_checkpoint") or "").rstrip("/").rpartition("/")[2])  # it may have been moved
    found = _of_checkpoint(text, place / next((name for name in names if name in checkpoints), checkpoints[-1]), into)
    return FoundModel(**found.__dict__ | {"name": place.name})


def _best_of_history(last: StoragePath) -> dict[str, Any] | None:
    """The epoch with the lowest top-1 error, the last of equal ones, of a run without a result, such as a trial: by its
    last checkpoint. None if that says nothing."""
    try:
        history = load_json((last / STATE).read())["state"]["history"]
        best: dict[str, Any] = min(reversed(history), key=lambda entry: entry["val/top1_error"])
        return best if type(best["epoch"]) is int else None
    except (OSError, ValueError, KeyError, TypeError, StorageError):
        return None


def _of_checkpoint(text: str, place: StoragePath, into: Path) -> FoundModel:
    """A checkpoint, with what is known of the run that it lies in."""
    parent = place.parent
    inside = (parent / CONFIG).size() is not None
    run = RunFolder(parent.parent, parent.name) if inside else None
    result = run.result() if run else {}
    data = str(shards_of(run.config(), run.output)) if run else None
    return FoundModel(
        text, f"{parent.name}-{place.name}" if inside else place.name, _as_model(place, run, into),
        run.path if run else None, parent if run else None, data, result.get("mlflow_run_id"),
        tracking_uri_of(result.get("mlflow_tracking_uri"))[0] if result.get("mlflow_run_id") else None,
    )  # fmt: skip


def _as_model(place: StoragePath, run: RunFolder | None, into: Path) -> Path:
    """A checkpoint as a folder that alexnet.load reads: itself, or a copy; one of before 0.3 has no description."""
    whole = (place / DESCRIPTION).size() is not None
    if whole and place.local is not None:
        return place.local
    into.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, DESCRIPTION, MEAN_IMAGE) if whole else (WEIGHTS,):
        if place.local is not None:
            shutil.copyfile(place.local / name, into / name)
        else:
            with (into / name).open("wb") as file:
                file.writelines((place / name).chunks())
    if not whole:
        _describe(place, run, into)
    return into


def _describe(place: StoragePath, run: RunFolder | None, into: Path) -> None:
    """Write the description of a checkpoint that has none, from its run's settings and data."""
    lacks = f"{place}: was written before 0.3 and does not say what net it is"
    if run is None:
        raise ValueError(f"{lacks}; give it by its run's folder")
    config = run.config()
    data = shards_of(config, run.output)
    if (data / MANIFEST).size() is None:
        raise ValueError(f"{lacks}, and its data, {data}, is not there")
    manifest = read_manifest(data)
    try:
        mean_image = read_mean_image(data, manifest)
    except DamagedData as error:
        raise ValueError(str(error)) from None
    known, classes = run.result().get("digest"), run.result().get("classes")
    if known not in (None, manifest.digest) or classes not in (None, list(manifest.classes)):
        raise ValueError(f"{lacks}, and {data} is not what it was trained on")
    epoch = place.name.removeprefix(CHECKPOINT_PREFIX).partition("-")[0]
    num_classes = config.num_classes or len(manifest.classes)
    described = describe(config, manifest, num_classes, int(epoch) if epoch.isdecimal() else None)
    write_description(into, described, mean_image)


def _checkpoints(run: StoragePath) -> list[str]:
    """Names of a run's checkpoints, the oldest first."""
    return sorted(name for name in run.children() if name.startswith(CHECKPOINT_PREFIX))


def _runs_in(output: StoragePath) -> list[str]:
    if not output.is_folder():
        return []
    found = [name for name, is_folder in output.children().items() if is_folder]
    return [name for name in found if (output / name / CONFIG).size() is not None
            or (output / name / SEARCH_YAML).size() is not None]  # fmt: skip
