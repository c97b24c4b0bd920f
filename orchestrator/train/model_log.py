"""The model of a checkpoint, to MLflow: of a run's best epoch, and of a search's best trial."""

import logging
import shutil
import tempfile
from pathlib import Path

from alexnet.trained import WEIGHTS, write_description
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.data.shards import read_mean_image
from orchestrator.tracking.training_run import Tracker
from orchestrator.train.model import describe

EPOCH_TAG = "model.epoch"  # of the MLflow run: the epoch that the model is of

log = logging.getLogger(__name__)


def log_model(tracker: Tracker, config: TrainConfig, data: Dataset, checkpoint: StoragePath, epoch: int) -> None:
    """Log the net of a checkpoint, which was saved after `epoch`, with what serving it takes. A server that fails is
    warned of. Raises OSError where the checkpoint cannot be read, DamagedData where the mean image is not the data's.
    """
    num_classes = data.num_classes(config)
    description = describe(config, data.manifest, num_classes, epoch)
    mean_image = read_mean_image(data.folder, data.manifest)
    log.info("logging the model of epoch %d to MLflow, from %s", epoch, checkpoint)
    with checkpoint.as_local_dir() as folder, tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "net")
        model.mkdir()
        shutil.copyfile(folder / WEIGHTS, model / WEIGHTS)
        write_description(model, description, mean_image)
        tracker.log_model(model, step=epoch)
    tracker.run.tag(**{EPOCH_TAG: str(epoch)})
