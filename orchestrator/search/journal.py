"""What happened in a search: a file of one JSON object a line, only ever appended to, and what follows from it.

It is the search's only memory. A search that goes on, after whatever end, is a new one whose searcher and scheduler
have been told all that is written here; nothing is pickled.
"""

import contextlib
import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.search.space import Values

JOURNAL = "journal.jsonl"
UPLOAD_EVERY_S = 1.0
PAPER_TRIAL = 0  # the number of the trial that has the paper's constants

Status = Literal["RUNNING", "FINISHED", "STOPPED", "FAILED"]
Metrics = dict[str, Any]


@dataclass
class TrialRecord:
    """What is known of a trial."""

    number: int
    values: Values
    status: Status = "RUNNING"  # begun, and not at its end: it may be waiting for the search to go on
    history: list[Metrics] = field(default_factory=list)  # an entry an epoch
    error: str | None = None
    run_id: str | None = None  # MLflow's
    start: dict[str, Any] | None = None  # the checkpoint of another trial that it went on from
    lineage: str = ""  # "" or how it came to that start
    exploits: int = 0  # how often its weights were replaced

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

    def __init__(self, place: Path | StoragePath) -> None:
        """Read what is there. A last line that was cut off by a crash is dropped. Raises ValueError for damage.

        In object storage, where nothing can be appended, the whole file is written again a second after a change at the
        latest. What a killed process had not written is made again from the trials' checkpoints.
        """
        self._place = StoragePath.of(place)
        self._copy = None if self._place.local is not None else tempfile.TemporaryDirectory(prefix="journal-")
        path = self._place.local or Path(self._copy.name if self._copy else "", JOURNAL)
        if self._copy and self._place.size() is not None:
            path.write_bytes(self._place.read())
        self.path, self.trials, self.parent_run_id = path, dict[int, TrialRecord](), None
        self.results: list[tuple[int, Metrics]] = []  # of all trials, as they came
        self.elapsed_s = 0.0  # of earlier sessions
        self.usd: float | None = None  # what it had cost, where nodes have a price
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._place}, line {number}: damaged: {error}") from None
        self._before, self._began = self.elapsed_s, time.monotonic()
        self._file = path.open("ab")
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        self._changed, self._closed = threading.Event(), False
        self._uploader: threading.Thread | None = None
        if self._copy:
            self._uploader = threading.Thread(target=self._upload, name="journal", daemon=True)
            self._uploader.start()

    def write(self, event: str, **fields: Any) -> None:
        """Append, and bring the records up to it. A line is there whole or not at all."""
        now = self._before + time.monotonic() - self._began
        entry = {"event": event, **fields, "at_s": round(now, 3)}
        self._file.write((json.dumps(entry) + "\n").encode())
        self._file.flush()
        self._changed.set()
        self._apply(entry)

    def close(self) -> None:
        """Raises StorageError where the last of it could not be written."""
        if self._closed:
            return
        self._closed = True
        self._changed.set()
        self._file.close()
        if self._copy and self._uploader:
            self._uploader.join()
            self._place.write(self.path.read_bytes())
            self._copy.cleanup()

    def _upload(self) -> None:
        while not self._closed:
            self._changed.wait()
            self._changed.clear()
            with contextlib.suppress(StorageError):  # it is tried again with the next change, and at the end aloud
                self._place.write(self.path.read_bytes())
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

    def _apply(self, entry: dict[str, Any]) -> None:
        self.elapsed_s = entry["at_s"]
        if entry["event"] == "search":
            self.parent_run_id = entry["run_id"]
            return
        if entry["event"] == "cost":
            self.usd = entry["usd"]
            return
        number = entry["number"]
        if entry["event"] == "trial":
            self.trials[number] = TrialRecord(number, entry["values"])
            return
        record = self.trials[number]
        if entry["event"] == "run":
            record.run_id = entry["run_id"]
        elif entry["event"] == "epoch":
            if entry["metrics"]["epoch"] != record.epoch + 1:
                raise ValueError(f"epoch {entry['metrics']['epoch']} of trial {number} after {record.epoch}")
            record.history.append(entry["metrics"])
            self.results.append((number, entry["metrics"]))
        elif entry["event"] == "started":
            pass  # for benchmarks/search_overhead.py
        elif entry["event"] == "exploit":
            record.values, record.start = entry["values"], entry["start"]
            record.exploits += 1
            record.lineage = f"-{record.exploits}-from-{entry['donor']:04d}-at-{entry['start']['epoch']:04d}"
            record.history = [metrics for metrics in record.history if metrics["epoch"] <= entry["start"]["epoch"]]
        elif entry["event"] == "end":
            record.status, record.error = entry["status"], entry.get("error")
        else:
            raise ValueError(f"{entry['event']!r} is no event of a search")
