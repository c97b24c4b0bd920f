"""An evaluation in the MLflow run of its model, which has usually ended: its status and its end stay as they are."""

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.tracking.run import Run
from orchestrator.tracking.store import Store


def log_evaluation(
    uri: str,
    run_id: str,
    metrics: Mapping[str, float],
    texts: Mapping[str, str],
    pictures: Mapping[str, Any],
    *,
    step: int,
    warn: Callable[[str], None],
) -> bool:
    """Add metrics, text files and figures to a run; returns whether the metrics got there. A server that is away, or
    a run that is gone, is warned of: the files of the evaluation have it all.

    step: the epochs that the model was trained for.
    """
    import mlflow

    try:
        store = Store(uri)
    except ValueError as error:
        warn(f"the evaluation did not reach MLflow: {error}")
        return False
    run = Run(store, warn)
    run.run_id = run_id
    try:
        if not store.exists(run_id):
            warn(f"the evaluation did not reach MLflow: run {run_id} is not in {store.redacted(uri)}")
            return False
        now = mlflow.utils.time.get_current_time_millis()
        points = [mlflow.entities.Metric(name, value, now, step) for name, value in metrics.items()]
        store.client.log_batch(run_id, metrics=points)
    except Exception as error:  # whatever the server answers
        warn(f"the evaluation did not reach MLflow: {store.reason(error)}")
        return False
    for name, text in texts.items():
        run.log_text(text, name)
    for name, figure in pictures.items():
        run.log_picture(figure, name)
    return True
