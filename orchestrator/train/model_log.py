"""The model of a checkpoint, to MLflow: of a run's best epoch, and of a search's best trial; and its registration."""

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from alexnet.trained import DESCRIPTION, MEAN_IMAGE, WEIGHTS, Description, write_description
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.data.shards import Manifest, read_mean_image
from orchestrator.tracking import registry
from orchestrator.tracking.run import Run
from orchestrator.tracking.training_run import Tracker
from orchestrator.train.messages import Metrics
from orchestrator.train.model import describe
from orchestrator.train.model_card import MODEL_CARD, NET, data_line, errors_line, model_card, net_line

EPOCH_TAG = "model.epoch"  # of the MLflow run: the epoch that the model is of

log = logging.getLogger(__name__)


def log_model(
    tracker: Tracker, config: TrainConfig, data: Dataset, checkpoint: StoragePath, entry: Metrics, place: StoragePath
) -> bool:
    """Log the net of a checkpoint, which was saved after the epoch `entry`, with what serving it takes and its card,
    which is put into its run's folder, `place`, too.

    Returns whether it is in MLflow, now or already; a server that fails is warned of. Raises OSError where the
    checkpoint cannot be read, DamagedData where the mean image is not the data's.
    """
    epoch, run = int(entry["epoch"]), tracker.run
    card = model_card(config, data.manifest, entry, run_id=run.run_id, checkpoint=checkpoint, place=place)
    (place / MODEL_CARD).write(card.encode())
    log.info("logging the model of epoch %d to MLflow, from %s", epoch, checkpoint)
    with checkpoint.as_local_dir() as folder, tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, NET)
        model.mkdir()
        shutil.copyfile(folder / WEIGHTS, model / WEIGHTS)
        if (folder / DESCRIPTION).is_file():  # its mean image may be another than the data's (pretrained.py)
            for name in (MEAN_IMAGE, DESCRIPTION):
                shutil.copyfile(folder / name, model / name)
        else:  # of before 0.3
            description = describe(config, data.manifest, data.num_classes(config), epoch)
            write_description(model, description, read_mean_image(data.folder, data.manifest))
        (model / MODEL_CARD).write_text(card)
        # a run that is resumed, and has no better epoch since, has it already
        logged = tracker.newest_step() == epoch or tracker.log_model(model, step=epoch) is not None
    run.log_text(card, MODEL_CARD)
    if logged:
        run.tag(**{EPOCH_TAG: str(epoch)})
    return logged


def version_facts(
    described: Description, manifest: Manifest, entry: Metrics, split: str = "val"
) -> tuple[dict[str, str], str]:
    """The tags of a model's version, and its description. entry: its errors on a split of the manifest's data."""
    tags = {
        "data.digest": described.digest or manifest.digest, "top1_error": f"{entry['val/top1_error']:.6f}",
        "epoch": str(entry["epoch"]),
    }  # fmt: skip
    if manifest.digest != tags["data.digest"]:
        tags["evaluated.digest"] = manifest.digest
    build = described.build
    net = net_line(build.get("preset", "paper"), build.get("width", 1.0), build.get("input_size"))
    return tags, f"{net}. {data_line(manifest)}. {errors_line(entry, manifest.rows[split], split)}."


def register_model(
    run: Run, name: str, config: TrainConfig, data: Dataset, entry: Metrics, later: str, say: Callable[[str], None]
) -> registry.Registered | None:
    """Register the model that a run logged last under a name, and say its address.

    later: the command that does it, which the warning names where it fails; the answer is then None.
    """
    described = describe(config, data.manifest, config.num_classes or len(data.manifest.classes), int(entry["epoch"]))
    tags, about = version_facts(described, data.manifest, entry)
    try:
        found = registry.register(run, name, tags, about)
    except Exception as error:  # whatever the server answers: the training is done
        run.warn(f"the model was not registered as {name}: {run.store.reason(error)}; register it later: {later}")
        return None
    say(f"registered as {found.address}" + ("" if found.is_new else ", which it was before"))
    return found
