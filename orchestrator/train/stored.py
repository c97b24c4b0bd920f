"""The checkpoints that a run has stored: which of them are whole, and what Ray Train is told of them.

Ray Train keeps its own list, checkpoint_manager_snapshot.json, and believes it whatever has become of the checkpoints.
It is written anew before workers start, from the records of the checkpoints that are whole.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base.exits import JobError
from orchestrator.base.ray_internals import SUPPORTED_RAY
from orchestrator.base.storage import StoragePath
from orchestrator.train import record
from orchestrator.train.checkpoints import STATE, checkpoint_name
from orchestrator.train.run_folder import CHECKPOINT_PREFIX, RunFolder

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's
DAMAGED_PREFIX = "damaged-"  # of a checkpoint that was set aside
ERROR = "val/top1_error"  # by which Ray Train finds the best
NEVER_BEST = 2.0  # error of a checkpoint without validation; infinity would become null on Ray's disk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint."""

    name: str
    error: float  # top-1, in validation


def restore_list(run: RunFolder, say: Callable[[str], None] = lambda text: None) -> None:
    """Write Ray Train's list of a run's checkpoints anew. Those that are damaged are told and, on a disk, set aside.

    Checkpoints in object storage are held against their records by size; the workers compare their sums. A run whose
    checkpoints are from before there were records keeps the list that it has. Raises JobError if none is whole, though
    Ray Train had a list; without one, the first was broken off while it was written, and the run begins anew.
    """
    found, wrong, has_record = [], [], False
    names = sorted(name for name, is_folder in run.path.children().items() if is_folder)
    for name in (name for name in names if name.startswith(CHECKPOINT_PREFIX)):
        try:
            checked, error = _check(run.path / name, name)
        except ValueError as difference:
            wrong.append((name, str(difference)))
            continue
        has_record = has_record or checked
        found.append(Stored(name, error))
    if not (has_record or wrong):
        return
    for name, reason in wrong:
        log.info("checkpoint %s is not whole: %s", name, reason)
        say(f"{reason.removesuffix(f'; {record.HINT}')}; {_set_aside(run, name)}")
    if not found:
        if (run.path / SNAPSHOT).size() is not None:
            raise JobError(f"run {run.name}: none of its checkpoints is whole; start a new run with another --name")
        say("no checkpoint was completed before: the run begins anew")
        return
    (run.path / SNAPSHOT).write(json.dumps(ray_list(found)).encode())


def recorded_settings(run: RunFolder) -> tuple[str, dict[str, Any]] | None:
    """The newest checkpoint whose record can be read, and the settings that it was made with."""
    for name, is_folder in sorted(run.path.children().items(), reverse=True):
        place = run.path / name / record.RECORD
        if is_folder and name.startswith(CHECKPOINT_PREFIX) and place.size() is not None:
            try:
                found = record.parse(place.read(), None, str(run.path / name))
            except ValueError:
                continue
            if found is not None:
                return name, found.settings
    return None


def ray_list(found: list[Stored]) -> dict[str, Any]:
    """Ray Train's list, in its own form: the worst first, of equal ones the earlier, and which is the latest."""
    entries = [{"version": 0, "checkpoint_dir_name": each.name, "metrics": {ERROR: each.error}} for each in found]
    order = sorted(range(len(found)), key=lambda index: (-found[index].error, index))
    return {
        "ray_version": SUPPORTED_RAY,
        "checkpoint_results": [entries[index] for index in order],
        "checkpoint_report_indices": order,
        "latest_checkpoint_result": entries[-1] if entries else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(found),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _check(place: StoragePath, name: str) -> tuple[bool, float]:
    """Whether a checkpoint has a record, and its error. Raises ValueError, of one line, if it is not whole."""
    if (place / STATE).size() is None:
        raise ValueError(f"{place}: has no {STATE}, so it was broken off while it was written")
    found = _sizes(place) if place.local is None else record.verify(place.local)
    try:
        state = json.loads((place / STATE).read())["state"]
        entry = state["history"][-1] if state["history"] else {}
        whole = checkpoint_name(state["epoch"], len(state["losses"])) == name and not state["losses"]
        return found is not None, float(entry[ERROR]) if whole and entry["epoch"] == state["epoch"] else NEVER_BEST
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{place / STATE}: damaged: has no state") from None


def _sizes(place: StoragePath) -> record.Record | None:
    """The record of a checkpoint in object storage, whose files have the sizes that it says. Raises ValueError."""
    text = (place / record.RECORD).read() if (place / record.RECORD).size() is not None else None
    found = record.parse(text, (place / STATE).read(), str(place))
    for file, wanted in (found.files if found else {}).items():
        size = (place / file).size()
        if size != wanted.bytes:
            has = "is missing" if size is None else f"damaged: has {size:,} bytes, and {wanted.bytes:,} were written"
            raise ValueError(f"{place / file}: {has}")
    return found


def _set_aside(run: RunFolder, name: str) -> str:
    """Rename a checkpoint that is not whole; returns what became of it."""
    folder = (run.path / name).local
    if folder is None:
        return "it is not used"
    number, target = 1, folder.with_name(DAMAGED_PREFIX + name)
    while target.exists():
        number += 1
        target = folder.with_name(f"{DAMAGED_PREFIX}{name}-{number}")
    Path(folder).rename(target)
    return f"it is not used, and now called {target.name}"
