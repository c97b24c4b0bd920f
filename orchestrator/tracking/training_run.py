"""The MLflow run of a training run: parameters, dataset, model."""

import base64
import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.shards import Manifest
from orchestrator.tracking import registry
from orchestrator.tracking.run import FINISH_TIMEOUT_S, Run, within
from orchestrator.tracking.store import Store

MONITOR_TIMEOUT_S = 10.0
MODEL = "model"  # its name in its run: runs:/RUN_ID/model


class Tracker:
    """The MLflow run of a training run."""

    def __init__(self, uri: str, run: Run | None = None) -> None:
        """Connect, creating a new store where there is none. Raises ValueError of one line where that fails.

        run: one that is there already, in a store that is connected.
        """
        self.run = run or Run(Store(uri))
        self.run.patience_s = FINISH_TIMEOUT_S
        self._monitor: Any = None

    def start(
        self,
        name: str,
        config: TrainConfig,
        manifest: Manifest,
        data: StoragePath,
        *,
        run_id: str | None = None,
        new_data: bool = False,
        note: str = "",
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Begin a run, or go on with an earlier one; log what is known at the start.

        new_data: whether its images may be others than those of the earlier run. From here on a server that fails is
        no reason to stop training: `warn` is told, and metrics are sent later. note: the run's description (note.py).
        """
        run, run.warn, run.note = self.run, warn, note
        patience = run.patience_s
        is_new = run.begin(name, "jobs/train.py", config.resolved(), run_id=run_id)
        run.say_if_replaced()
        if is_new or new_data:
            try:
                run.patiently(lambda: self._log_dataset(manifest, data))
            except Exception as error:  # the run's folder has it, too
                warn(f"the dataset did not reach MLflow: {run.store.reason(error)}")
        if not is_new:
            run.tag(**{"resumed.epochs": str(config.epochs)})
        run.patience_s = 0.0  # the workers are at work already
        run.log_text(config.to_yaml(), "config.yaml")
        run.log_text(manifest.model_dump_json(indent=1), "manifest.json")
        run.patience_s, run.is_given_up = patience, False
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run.run_id, resume_logging=bool(run_id))
        self._monitor.start()

    def log_model(self, folder: Path, step: int = 0) -> str | None:
        """The net of a model's folder (alexnet/trained.py) as an MLflow model (served_model.py), of which nothing is
        pickled; returns its id, or None after a warning. step: by which the newest of a run's models is told."""
        import mlflow

        # advice for authors of models; not catch_warnings, which is no good beside MLflow's own threads
        warnings.filterwarnings("ignore", message="(?is).*input example", category=UserWarning)
        here = Path(__file__).parent

        def log() -> str:
            with mlflow.start_run(run_id=self.run.run_id, log_system_metrics=False):
                logged = mlflow.pyfunc.log_model(
                    name=MODEL,
                    python_model=str(here / "served_model.py"),
                    artifacts={"net": str(folder)},
                    code_paths=[str(here.parent.parent / "alexnet")],
                    signature=_signature(),
                    input_example=[base64.b64encode(_example()).decode()],
                    model_config={"files": False},
                    pip_requirements=["torch", "numpy", "numba", "pandas", "pillow", "safetensors", "simplejpeg"],
                    step=step,
                )
            return str(logged.model_id)

        try:
            return self.run.patiently(log)
        except Exception as error:
            run = self.run
            run.warn(f"the model did not reach MLflow; its checkpoint is kept: {run.store.reason(error)}")
            return None

    def newest_step(self) -> int | None:
        """The step of the newest model that its run has; None where it has none, or the server does not say."""
        try:
            return registry.newest_step(self.run.store, self.run.run_id)
        except Exception:  # whatever the server answers: it is asked to take the model next, which is warned of
            return None

    def finish(self, status: str, error: str | None = None, *, hurry: bool | None = None) -> None:
        if self._monitor is not None:  # it sends its last values itself, to a server that may be away
            within(MONITOR_TIMEOUT_S, self._end_monitor)
        self.run.finish(status, error, hurry=hurry)

    def _end_monitor(self) -> None:
        with contextlib.suppress(Exception):  # the run's status is worth more
            self._monitor.finish()

    def _log_dataset(self, manifest: Manifest, data: StoragePath) -> None:
        from mlflow.data.filesystem_dataset_source import FileSystemDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        class Folder(FileSystemDatasetSource):  # type: ignore[misc]
            """A folder of shards; MLflow records its path and never loads it."""

            uri = property(lambda self: str(data))

            @staticmethod
            def _get_source_type() -> str:
                return "local" if data.local else data.text.split("://")[0]

            def load(self, dst_path: str | None = None) -> str:
                return str(data)

            @staticmethod
            def _can_resolve(raw_source: Any) -> bool:
                return False

            def to_dict(self) -> dict[str, str]:
                return {"uri": self.uri}

            @classmethod
            def from_dict(cls, source_dict: dict[str, str]) -> "Folder":
                return cls()

        dataset = MetaDataset(Folder(), name=manifest.source, digest=manifest.digest)
        entity = dataset._to_mlflow_entity()
        inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])]
        self.run.client.log_inputs(self.run.run_id, inputs)


def _signature() -> Any:
    """What the model answers, and its parameters; why it has no schema of its input is in served_model.py."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    guess = Object([Property("class", DataType.string), Property("probability", DataType.double)])
    return ModelSignature(
        outputs=Schema([
            ColSpec(DataType.string, "class"), ColSpec(DataType.double, "probability"), ColSpec(Array(guess), "top"),
        ]),
        params=ParamSchema([
            ParamSpec("top", DataType.long, 5), ParamSpec("views", DataType.long, 1),
            ParamSpec("probabilities", DataType.boolean, False),
        ]),
    )  # fmt: skip


def _example() -> bytes:
    """A picture of 48 x 48 pixels as a JPEG: a slope from dark to light."""
    import numpy as np

    from alexnet import images

    slope = np.linspace(0, 255, 48).astype(np.uint8)
    return images.encode(np.stack([np.broadcast_to(slope, (48, 48))] * 3, axis=2), quality=90)
