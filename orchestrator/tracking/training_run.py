"""The MLflow run of a training run: parameters, dataset, model."""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.shards import Manifest
from orchestrator.tracking.run import FINISH_TIMEOUT_S, Run, within
from orchestrator.tracking.store import Store

MONITOR_TIMEOUT_S = 10.0


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
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Begin a run, or go on with an earlier one; log what is known at the start.

        new_data: whether its images may be others than those of the earlier run. From here on a server that fails is
        no reason to stop training: `warn` is told, and metrics are sent later.
        """
        run, run.warn = self.run, warn
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

    def log_model(self, folder: Path, image_size: int, num_classes: int) -> None:
        """The net of a model's folder (alexnet/trained.py) as an MLflow model: stored images in, class probabilities
        out. Nothing in it is pickled."""
        import mlflow
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, image_size, image_size, 3))]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, num_classes))]),
        )
        # advice for authors of models; not catch_warnings, which is no good beside MLflow's own threads
        warnings.filterwarnings("ignore", message="(?is).*input example", category=UserWarning)
        here = Path(__file__).parent

        def log() -> None:
            with mlflow.start_run(run_id=self.run.run_id, log_system_metrics=False):
                mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(here / "served_model.py"),
                    artifacts={"net": str(folder)},
                    code_paths=[str(here.parent.parent / "alexnet")],
                    signature=signature,
                    pip_requirements=["torch", "numpy", "numba", "pillow", "safetensors", "simplejpeg"],
                )

        try:
            self.run.patiently(log)
        except Exception as error:
            run = self.run
            run.warn(f"the model did not reach MLflow; its checkpoint is kept: {run.store.reason(error)}")

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
