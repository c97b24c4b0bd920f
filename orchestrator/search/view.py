"""What a search prints: a live table, a line for every trial that ends, and what it learned."""

import time
from typing import Any

from orchestrator.base.shown import count_of
from orchestrator.base.terminal import LiveBlock, columns, duration, percent
from orchestrator.search.analysis import TOP, compare, epochs_used
from orchestrator.search.config import SearchConfig
from orchestrator.search.journal import PAPER_TRIAL, Journal, TrialRecord
from orchestrator.train.messages import Step, TrialStarted, Warned

TABLE_EVERY_S = 60.0  # in a log
REDRAW_S = 1.0  # on a terminal
ROWS = 12  # of the table, the running trials first


class SearchView:
    """The terminal output of `jobs/tune.py`."""

    def __init__(self, config: SearchConfig, journal: Journal) -> None:
        self.config, self.journal = config, journal
        self.block = LiveBlock(TABLE_EVERY_S)
        self.running: dict[int, str] = {}  # what each is doing
        self._drawn = time.monotonic()

    def say(self, *lines: str) -> None:
        self.block.print(*lines)

    def event(self, number: int, event: TrialStarted | Step | Warned) -> None:
        """Of a trial, while it runs."""
        if self.journal.trials[number].ended:
            return  # it came late
        if isinstance(event, TrialStarted):
            self.running[number] = "running"
            if event.lost:
                self.say(f"trial {number}: a worker was lost; resuming after epoch {event.epoch}")
        elif isinstance(event, Step):
            share = event.step / event.steps
            text = f"epoch {event.epoch + 1} {100 * share:.0f} %, loss {event.loss:.3f}"
            self.running[number] = f"{text}, {event.images_per_s:.0f} images/s"
        else:
            self.say(f"trial {number}: warning: {event.text}")

    def begun(self, record: TrialRecord) -> None:
        self.running[record.number] = "starting"

    def ended(self, record: TrialRecord) -> None:
        self.running.pop(record.number, None)
        verb = {"FINISHED": "finished", "STOPPED": "stopped", "FAILED": "failed"}[record.status]
        best = record.best(self.config.metric)
        text = f"trial {record.number} {verb} after {count_of(record.epoch, 'epoch')}"
        if best:
            text += f": {self._metric(best)}"
        if record.error:
            text += f": {record.error}"
        self.say(f"{text} ({self._values(record)})")

    def exploited(self, record: TrialRecord, donor: int) -> None:
        assert record.start is not None
        where = f"trial {donor} after epoch {record.start['epoch']}"
        self.say(f"trial {record.number} continues from {where} ({self._values(record)})")

    def refresh(self) -> None:
        """Draw the table, if it is time."""
        if time.monotonic() - self._drawn >= REDRAW_S:
            self._drawn = time.monotonic()
            self.block.update(self.lines())

    def lines(self) -> list[str]:
        """The table: the trials under way, then the best of the others."""
        trials = self.journal.trials
        ranked = self.journal.ranked(self.config.metric)
        under_way = [trials[number] for number in sorted(self.running)]
        others = [record for record in ranked if record.number not in self.running]
        chosen = under_way + others[: max(3, ROWS - len(under_way))]
        done = sum(record.ended for record in trials.values())
        best = ranked[0].best(self.config.metric) if ranked else None
        head = f"-- {done} of {count_of(self.config.num_trials, 'trial')} done, {len(under_way)} under way, "
        head += f"{count_of(epochs_used(self.journal), 'epoch')}, {duration(self.journal.elapsed_s)}"
        if best:
            head += f", best {self._metric(best)} (trial {ranked[0].number})"
        return [head, *self.table(chosen)]

    def table(self, records: list[TrialRecord]) -> list[str]:
        names = self.config.space.names
        titles = ["trial", *names, "epoch", self.config.metric.removeprefix("val/"), "status"]
        rows = []
        for record in records:
            best = record.best(self.config.metric)
            status = self.running.get(record.number, record.status.lower())
            if record.number == PAPER_TRIAL:
                status += ", the paper's constants"
            rows.append(
                [str(record.number), *(shown(record.values[name]) for name in names), str(record.epoch),
                 self._metric(best, bare=True) if best else "-", status]
            )  # fmt: skip
        return columns(titles, rows) if rows else []

    def findings(self, num_val: int) -> list[str]:
        """The best five, and the best against the paper's."""
        ranked = self.journal.ranked(self.config.metric)
        lines = [f"best of {count_of(len(self.journal.trials), 'trial')}", *self.table(ranked[:TOP])]
        comparison = compare(self.config, self.journal, num_val)
        papers = self.journal.trials[PAPER_TRIAL]
        if comparison:
            lines += ["", str(comparison)]
        elif papers.status == "FAILED":
            lines += ["", f"no comparison with the paper's constants, whose trial failed: {papers.error}"]
        return lines

    def _metric(self, entry: dict[str, Any], *, bare: bool = False) -> str:
        value = entry[self.config.metric]
        text = percent(value) if self.config.metric.endswith("error") else f"{value:.4f}"
        name = {"val/top1_error": "top-1 error", "val/top5_error": "top-5 error", "val/loss": "loss"}
        return text if bare else f"{name[self.config.metric]} {text}"

    def _values(self, record: TrialRecord) -> str:
        if record.number == PAPER_TRIAL:
            return "the paper's constants"
        return ", ".join(f"{name} {shown(value)}" for name, value in record.values.items())


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
