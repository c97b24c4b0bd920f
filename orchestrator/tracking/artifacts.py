"""Files for a run in MLflow, whether or not it has ended.

Metrics may come with them; the run's status and its end stay as they are.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from orchestrator.base.exits import last_line
from orchestrator.base.redaction import redact
from orchestrator.tracking.store import Store


def add_files(
    uri: str,
    run_id: str,
    folder: str,
    files: Mapping[str, bytes],
    metrics: Mapping[str, float] | None = None,
    *,
    step: int = 0,
) -> str | None:
    """Store files as artifacts of a run, in a folder of them, and metrics; earlier files of these names are replaced.

    step: of the metrics. Returns why that failed, in one line; None if it did not.
    """
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():  # which to connect would create
        return f"MLflow at {redact(uri)} is not there"
    try:
        store = Store(uri)
    except ValueError as error:
        return str(error)
    try:
        if not store.exists(run_id):
            return f"MLflow at {redact(uri)} has no run {run_id}"
        with tempfile.TemporaryDirectory() as temporary:
            for name, data in files.items():
                file = Path(temporary, name)
                file.write_bytes(data)
                store.client.log_artifact(run_id, str(file), folder)
        if metrics:  # last: values without the files that explain them would look whole
            import mlflow

            now = mlflow.utils.time.get_current_time_millis()
            points = [mlflow.entities.Metric(name, value, now, step) for name, value in metrics.items()]
            store.client.log_batch(run_id, metrics=points)
    except Exception as error:  # whatever a server answers: what the files show was worth the time all the same
        return f"MLflow at {redact(uri)}: {redact(last_line(error))}"
    return None
