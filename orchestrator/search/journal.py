"""What happened in a search: an append-only file of one JSON object per line (entries.py), and the state it implies.

It is the search's only memory. A search that is resumed, however it ended, is a new one whose searcher and scheduler
have been told everything written here; nothing is pickled.
"""

import contextlib
import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.base.schema import check_version, load_json
from orchestrator.base.shown import shown
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.search.entries import (
    SCHEMA_VERSION,
    CostSoFar,
    Entry,
    EpochEnded,
    Exploited,
    Header,
    Metrics,
    RunBegun,
    SearchBegun,
    Status,
    TrialEnded,
    TrialProposed,
    WorkersStarted,
    from_json,
    to_json,
)
from orchestrator.search.space import Values

JOURNAL = "journal.jsonl"
UPLOAD_EVERY_S = 1.0
LONGEST_REASON = 200  # characters
PAPER_TRIAL = 0  # the number of the trial that has the paper's constants


@dataclass
class TrialRecord:
    """What is known of a trial."""

    number: int
    values: Values
    status: Status = "RUNNING"  # begun and not ended; it may be waiting for the search to be resumed
    history: list[Metrics] = field(default_factory=list)  # one entry per epoch
    error: str | None = None
    run_id: str | None = None  # MLflow's
    start: dict[str, Any] | None = None  # the checkpoint of another trial that it continued from
    lineage: str = ""  # "" or how it came to that start
    exploits: int = 0  # how often its weights were replaced
    earlier_folders: list[str] = field(default_factory=list)  # the names of its runs before those changes

    @property
    def epoch(self) -> int:
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def ended(self) -> bool:
        return self.status != "RUNNING"

    @property
    def folder(self) -> str:
        """The name of its run; a new one after every change of its weights."""
        return f"{self.number:04d}{self.lineage}"

    def best(self, metric: str) -> Metrics | None:
        """Its best epoch, the first of several; after a change of weights only those since, if there are any."""
        since = self.start["epoch"] if self.start else 0
        history = [entry for entry in self.history if entry["epoch"] > since] or self.history
        return min(history, key=lambda entry: (entry[metric], entry["val/loss"])) if history else None


class Journal:
    """The records of all trials, by number, and the file that they come from."""

    def __init__(self, target: Path | StoragePath) -> None:
        """Read what is there. A last line that was cut off by a crash is dropped. Raises ValueError for damage, and for
        a file that a newer version wrote. A file without a Header, from before there were versions, is continued.

        In object storage, where nothing can be appended, the whole file is written again a second after a change at the
        latest. What a killed process had not written is made again from the trials' checkpoints.
        """
        self._target = StoragePath.of(target)
        self._copy = None if self._target.local is not None else tempfile.TemporaryDirectory(prefix="journal-")
        path = self._target.local or Path(self._copy.name if self._copy else "", JOURNAL)
        if self._copy and self._target.size() is not None:
            path.write_bytes(self._target.read())
        self.path, self.trials = path, dict[int, TrialRecord]()
        self.parent_run_id: str | None = None
        self.results: list[tuple[int, Metrics]] = []  # of all trials, as they came
        self.elapsed_s = 0.0  # of earlier sessions
        self.usd: float | None = None  # what it had cost, where nodes have a price
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                document = load_json(line)
                is_header = document["event"] == Header.event
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._target}, line {number}: damaged: {shown(error, LONGEST_REASON)}") from None
            if is_header:
                check_version(document, SCHEMA_VERSION, self._target)
            try:
                self._apply(*from_json(document))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._target}, line {number}: damaged: {shown(error, LONGEST_REASON)}") from None
        self._before, self._began = self.elapsed_s, time.monotonic()
        self._file = path.open("ab")
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        self._changed, self._closed = threading.Event(), False
        self._uploader: threading.Thread | None = None
        if self._copy:
            self._uploader = threading.Thread(target=self._upload, name="journal", daemon=True)
            self._uploader.start()
        if not whole:
            self.write(Header(SCHEMA_VERSION))

    def write(self, entry: Entry) -> None:
        """Append an entry and update the records. A line is there whole or not at all."""
        at_s = round(self._before + time.monotonic() - self._began, 3)
        self._file.write((json.dumps(to_json(entry, at_s)) + "\n").encode())
        self._file.flush()
        self._changed.set()
        self._apply(entry, at_s)

    def close(self) -> None:
        """Raises StorageError where the last of it could not be written."""
        if self._closed:
            return
        self._closed = True
        self._changed.set()
        self._file.close()
        if self._copy and self._uploader:
            self._uploader.join()
            self._target.write(self.path.read_bytes())
            self._copy.cleanup()

    def _upload(self) -> None:
        while not self._closed:
            self._changed.wait()
            self._changed.clear()
            with contextlib.suppress(StorageError):  # it is tried again with the next change, and at the end aloud
                self._target.write(self.path.read_bytes())
            time.sleep(UPLOAD_EVERY_S)

    def ranked(self, metric: str) -> list[TrialRecord]:
        """Trials that have an epoch, the best first; of equals the one with the smaller loss, then the earlier. Those
        that failed come last: training with their settings would fail again."""
        found = [(record.best(metric), record) for record in self.trials.values()]
        known = [
            (record.status == "FAILED", best[metric], best["val/loss"], record.number, record)
            for best, record in found
            if best
        ]
        return [each[-1] for each in sorted(known, key=lambda each: each[:4])]

    def _apply(self, entry: Entry, at_s: float) -> None:
        self.elapsed_s = at_s
        match entry:
            case SearchBegun(run_id):
                self.parent_run_id = run_id
            case CostSoFar(usd):
                self.usd = usd
            case TrialProposed(number, values):
                self.trials[number] = TrialRecord(number, dict(values))
            case RunBegun(number, run_id):
                self.trials[number].run_id = run_id
            case EpochEnded(number, metrics):
                record = self.trials[number]
                if metrics["epoch"] != record.epoch + 1:
                    raise ValueError(f"epoch {metrics['epoch']} of trial {number} after {record.epoch}")
                record.history.append(metrics)
                self.results.append((number, metrics))
            case Exploited(number, donor, values, start):
                record = self.trials[number]
                record.earlier_folders.append(record.folder)
                record.values, record.start = dict(values), dict(start)
                record.exploits += 1
                record.lineage = f"-{record.exploits}-from-{donor:04d}-at-{start['epoch']:04d}"
                record.history = [metrics for metrics in record.history if metrics["epoch"] <= start["epoch"]]
            case TrialEnded(number, status, error):
                record = self.trials[number]
                record.status, record.error = status, error
            case WorkersStarted() | Header():
                pass
