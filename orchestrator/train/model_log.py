"""The model of a checkpoint, to MLflow: of a run's best epoch, and of a search's best trial."""

import logging
import tempfile
from pathlib import Path

from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.data.shards import MEAN_IMAGE
from orchestrator.tracking.training_run import Tracker
from orchestrator.train.checkpoints import WEIGHTS

EPOCH_TAG = "model.epoch"  # of the MLflow run: the epoch that the model is of

log = logging.getLogger(__name__)


def log_model(tracker: Tracker, config: TrainConfig, data: Dataset, checkpoint: StoragePath, epoch: int) -> None:
    """Log the net of a checkpoint, which was saved after `epoch`, with what serving it takes. A server that fails is
    warned of. Raises OSError where the checkpoint cannot be read."""
    manifest, num_classes = data.manifest, data.num_classes(config)
    description = {
        "build": {
            "preset": config.preset,
            "num_classes": num_classes,
            "input_size": config.input_size,
            "width": config.width,
            "dropout": config.dropout,
            "lrn": {"k": config.lrn_k, "n": config.lrn_n, "alpha": config.lrn_alpha, "beta": config.lrn_beta},
        },
        "pixel_scale": config.pixel_scale,
        "classes": manifest.classes,
        "epoch": epoch,
    }
    log.info("logging the model of epoch %d to MLflow, from %s", epoch, checkpoint)
    with checkpoint.as_local_dir() as folder, tempfile.TemporaryDirectory() as temporary:
        mean_image = Path(temporary, MEAN_IMAGE)
        mean_image.write_bytes((data.folder / manifest.mean_image_file).read())
        tracker.log_model(folder / WEIGHTS, mean_image, description, manifest.image_size, num_classes)
    tracker.run.tag(**{EPOCH_TAG: str(epoch)})
