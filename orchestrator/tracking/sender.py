"""Metrics on their way to MLflow: sent by a thread, so that neither training nor a signal waits for a server."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.base.exits import last_line
from orchestrator.base.shown import count_of
from orchestrator.tracking.store import RETRY_S, Metrics, Store, is_refusal

BATCH = 200  # entries of about five metrics each; 1000 metrics are the API's limit

log = logging.getLogger(__name__)


class Sender:
    """Sends a run's metrics again and again until the server takes them. What it refuses for good is reported once
    and dropped: it would hold up all that follows."""

    def __init__(self, store: Store, run_id: Callable[[], str], warn: Callable[[str], None]) -> None:
        self.store, self.run_id, self.warn = store, run_id, warn
        self._unsent: list[tuple[Metrics, int, int]] = []  # (metrics, step, time in ms)
        self._to_complete: tuple[list[dict[str, Any]], str] | None = None
        self._lock, self._news, self._closing = threading.Lock(), threading.Event(), False
        self._thread: threading.Thread | None = None
        self._refused = False  # whether that was reported

    def add(self, metrics: Metrics, step: int) -> None:
        """Metrics at an update."""
        import mlflow

        with self._lock:
            self._unsent.append((metrics, step, mlflow.utils.time.get_current_time_millis()))
        self._wake()

    def add_epoch(self, metrics: dict[str, Any], more: Metrics | None = None) -> None:
        """An entry of a history: its `step` is the update that it was taken at."""
        values = {name: value for name, value in metrics.items() if name != "step"}
        self.add(values | (more or {}), step=metrics["step"])

    def complete(self, history: list[dict[str, Any]], metric: str) -> None:
        """Send those entries of a history at whose update the metric was not logged: a crash may have lost them."""
        self._to_complete = list(history), metric
        self._wake()

    def close(self, timeout_s: float) -> None:
        """Wait for what is unsent, and say what remains so."""
        self._closing = True
        self._news.set()
        if self._thread is not None:
            self._thread.join(max(0.0, timeout_s))
        if self._is_pending():
            history, _ = self._to_complete or ([], "")
            count = len(self._unsent) + len(history)
            self.warn(f"{count_of(count, 'set')} of metrics did not reach MLflow; the run's folder has them")

    def _is_pending(self) -> bool:
        return bool(self._unsent) or self._to_complete is not None

    def _wake(self) -> None:
        self._news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
            self._thread.start()

    def _send(self) -> None:
        reported = False
        while not (self._closing and not self._is_pending()):
            self._news.wait()
            self._news.clear()
            while self._is_pending():
                try:
                    self._send_some()
                except Exception as error:  # training is worth more than its log
                    log.debug("MLflow: %s", last_line(error), exc_info=not reported)
                    if not reported:
                        self.warn(
                            f"MLflow does not accept metrics; they are kept and sent later: {self.store.reason(error)}"
                        )
                    reported = True
                    time.sleep(RETRY_S)
                    continue
                reported = False

    def _send_some(self) -> None:
        if self._to_complete is not None:
            history, metric = self._to_complete
            there = self._steps_of(metric)
            self._to_complete = None
            with self._lock:
                waiting = {step for _, step, _ in self._unsent}
            for metrics in history:
                if metrics["step"] not in there | waiting:
                    self.add_epoch(metrics)
        with self._lock:
            batch = self._unsent[:BATCH]
        values = [(key, value, at, step) for metrics, step, at in batch for key, value in metrics.items()]
        for first in range(0, len(values), 1000):
            self._send_values(values[first : first + 1000])
        with self._lock:
            del self._unsent[: len(batch)]

    def _steps_of(self, metric: str) -> set[int]:
        try:
            return {point.step for point in self.store.client.get_metric_history(self.run_id(), metric)}
        except Exception as error:
            if not is_refusal(error):
                raise
            return set()  # what is sent then is refused in its turn

    def _send_values(self, values: list[tuple[str, float, int, int]]) -> None:
        """All at once; one by one where the server refuses them, to lose no more than it must."""
        import mlflow

        entities = [mlflow.entities.Metric(key, value, at, step) for key, value, at, step in values]
        try:
            self.store.client.log_batch(self.run_id(), metrics=entities)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(values) > 1 and self.store.exists(self.run_id()):
                for each in values:
                    self._send_values([each])
                return
            self._report_refusal(error, values)

    def _report_refusal(self, error: Exception, values: list[tuple[str, float, int, int]]) -> None:
        log.info("MLflow refused %s: %s", count_of(len(values), "value"), values[:10])
        if not self._refused:
            what = values[0][0] if len(values) == 1 else f"{len(values)} metrics"
            self.warn(f"MLflow refused {what}; the run's folder has them: {self.store.reason(error)}")
        self._refused = True
