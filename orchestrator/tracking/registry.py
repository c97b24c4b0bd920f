"""Models in MLflow, by their addresses: runs:/RUN_ID/model, models:/NAME/VERSION, models:/NAME@ALIAS."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base.shown import LONGEST_VALUE, quoted, shown
from orchestrator.tracking.run import Run
from orchestrator.tracking.store import Store

SCHEMES = ("runs:/", "models:/")
CHAMPION = "champion"  # the alias of the version to use: models:/NAME@champion


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
    folder = next((file.parent for file in place.glob("artifacts/*/net.json")), None)
    if folder is None:
        raise ValueError(f"{address}: is no model of alexnet's, or one that a version before 0.3 logged")
    return LoggedModel(folder, _run_of(info))


def params_of(store: Store, run_id: str) -> dict[str, str] | None:
    """The parameters of the run that a model is said to be of; None where it is not in this store, or not any more.

    Raises ValueError of one line where the server does not say.
    """
    import mlflow

    try:
        found: dict[str, str] = store.client.get_run(run_id).data.params
        return found
    except mlflow.exceptions.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        reason = shown(store.reason(error), LONGEST_VALUE)
        raise ValueError(
            f"the run {run_id}: cannot be asked for in MLflow at {store.redacted(store.uri)}: {reason}"
        ) from None


def newest_step(store: Store, run_id: str) -> int | None:
    """The step, which is the epoch, of the model that `register` takes; None for a run without one. Raises what the
    server answers."""
    return max((step for step, _ in _whole_models(store, run_id)), default=None)


def _whole_models(store: Store, run_id: str) -> list[tuple[int, str]]:
    """Steps and ids of the models of a run. MLflow notes a model before its files are stored: one whose files did not
    arrive is left out."""
    outputs = store.client.get_run(run_id).outputs
    found = [(int(output.step), str(output.model_id)) for output in outputs.model_outputs] if outputs else []
    return [each for each in found if str(store.client.get_logged_model(each[1]).status) == "READY"]


def _run_of(info: Any) -> str | None:
    run_id: str | None = info.run_id
    return run_id or None


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    is_new: bool = True  # registered by this call

    @property
    def address(self) -> str:
        return f"models:/{self.name}/{self.version}"


def check_name(flag: str, name: str) -> str:
    """Raises ValueError of one line for a name that no registered model can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}", name):
        raise ValueError(
            f"{flag} {quoted(name)}: use at most 150 letters, digits, '.', '_' and '-', first a letter or digit"
        )
    return name


def register(run: Run, name: str, tags: Mapping[str, str], description: str = "") -> Registered:
    """The newest model of a run as a version of a registered model; the one that it is already, if there is one.

    tags: of the version. Retries while the server is away, for up to run.patience_s. Raises ValueError of one line
    for a run without a model, and what the server answers.
    """
    return run.patiently(lambda: _register(run.store, run.run_id, name, tags, description))


def _register(store: Store, run_id: str, name: str, tags: Mapping[str, str], description: str) -> Registered:
    import mlflow

    model_id = _newest_model(store, run_id)
    try:
        store.client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in store.client.search_model_versions(f"name = '{name}'"):
        if known.run_id == run_id and known.source == f"models:/{model_id}":
            return Registered(name, str(known.version), is_new=False)
    made = store.client.create_model_version(
        name, f"models:/{model_id}", run_id, dict(tags), description=description, await_creation_for=0,
        model_id=model_id,
    )  # fmt: skip
    return Registered(name, str(made.version))


def _newest_model(store: Store, run_id: str) -> str:
    """The id of the last model that a run logged. Raises ValueError of one line."""
    models = _whole_models(store, run_id)
    if not models:
        raise ValueError(f"the run {run_id} has no model in MLflow")
    return max(models, key=lambda model: model[0])[1]


def champion(store: Store, name: str) -> str | None:
    """The version of a registered model that its alias `champion` stands for; None if there is none.

    Raises what the server answers.
    """
    import mlflow

    try:
        return str(store.client.get_model_version_by_alias(name, CHAMPION).version)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            return None
        raise


def make_champion(run: Run, registered: Registered, reason: str) -> None:
    """Move the alias `champion` to a version, which is told why. Retries, and raises, as `register`."""

    def move() -> None:
        client = run.store.client
        client.set_model_version_tag(registered.name, registered.version, "champion.reason", reason[:5000])
        client.set_registered_model_alias(registered.name, CHAMPION, registered.version)

    run.patiently(move)
