"""Models in MLflow, by their addresses: runs:/RUN_ID/model, models:/NAME/VERSION, models:/NAME@ALIAS."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base.shown import LONGEST_VALUE, shown
from orchestrator.tracking.store import Store

SCHEMES = ("runs:/", "models:/")


@dataclass(frozen=True)
class LoggedModel:
    """A model that was fetched from MLflow."""

    folder: Path  # as alexnet.load reads it
    run_id: str | None  # of the run that it belongs to


def is_address(text: str) -> bool:
    return text.startswith(SCHEMES)


def fetch(store: Store, address: str, into: Path) -> LoggedModel:
    """Download a model's files into an empty folder. Nothing of it is executed or unpickled.

    Raises ValueError of one line.
    """
    import mlflow

    try:
        if address.startswith("runs:/") and address.count("/") < 2:
            raise ValueError("expected runs:/RUN_ID/model")
        place = Path(mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=str(into)))
        info = mlflow.models.Model.load(str(place))
    except Exception as error:  # whatever the server, the registry or the disk answers: the user needs the reason
        reason = shown(store.reason(error), LONGEST_VALUE)
        raise ValueError(f"{address}: cannot be fetched from MLflow at {store.redacted(store.uri)}: {reason}") from None
    folder = place / "artifacts" / "net"
    if not folder.is_dir():
        raise ValueError(f"{address}: is no model of alexnet's, or one that a version before 0.3 logged")
    return LoggedModel(folder, _run_of(info))


def _run_of(info: Any) -> str | None:
    run_id: str | None = info.run_id
    return run_id or None
