"""What people are told about a run and its model: the run's description in MLflow, and the model's card."""

import shlex
from typing import Any

from alexnet.intervals import error_interval
from alexnet.presets import preset_of
from alexnet.trained import DESCRIPTION
from orchestrator.base.environment import command
from orchestrator.base.markdown import code, code_block, escaped, table
from orchestrator.base.redaction import redact_all
from orchestrator.base.shown import LONGEST_VALUE
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import percent
from orchestrator.config.train import TrainConfig
from orchestrator.data.shards import Manifest
from orchestrator.tracking.note import note
from orchestrator.train.messages import Metrics
from orchestrator.train.pretrained import START
from orchestrator.train.run_folder import CONFIG

MODEL_CARD = "model_card.md"
NET = "net"  # the folder of the net in the model's artifacts in MLflow
ERRORS = {"val/top1_error": "top-1", "val/top5_error": "top-5"}
MOST_CLASSES = 50  # that a card lists
LICENCE = "not stated by the source; ask whoever the images are from before you pass the model on"


def net_line(preset: str, width: float, input_size: int | None) -> str:
    return f"AlexNet ({preset}, width {width:g}, {input_size or preset_of(preset).input_size} pixels)"


def net_line_of(config: TrainConfig) -> str:
    return net_line(config.preset, config.width, config.crop_size)


def data_line(manifest: Manifest) -> str:
    """Markdown."""
    rows = manifest.rows
    return (
        f"{escaped(manifest.source, LONGEST_VALUE)}, digest {code(manifest.digest)}: {len(manifest.classes)} classes, "
        f"{rows['train']} training and {rows['val']} validation images"
    )


def errors_line(entry: Metrics, num_val: int, split: str = "val") -> str:
    """The errors of an epoch, with their 95 % intervals, on so many images of a split."""
    found = [f"{ERRORS[name]} error {percent(entry[name])} ({_interval(entry[name], num_val)})"
             for name in ERRORS if name in entry]  # fmt: skip
    of = "validation" if split == "val" else "training"
    return f"{', '.join(found)} after epoch {entry['epoch']}, of {num_val} {of} images"


def repeating(place: StoragePath) -> str:
    """The command that trains again with the settings of a run, from what it started from. place: its folder."""
    start = place / START
    began = f" --start-from {shlex.quote(str(start))}" if (start / DESCRIPTION).size() is not None else ""
    return f"{command('train')} --config {shlex.quote(str(place / CONFIG))}{began}"


def run_note(config: TrainConfig, data: str, place: StoragePath, outcome: str, num_val: int, best: Any = None) -> str:
    """The description of a training run. data: `data_line`; outcome: such as "running"; best: its best epoch."""
    result = f"{outcome}; best: {errors_line(best, num_val)}" if best else outcome
    return note(f"{net_line_of(config)}, trained for up to {config.epochs} epochs.", data, result, repeating(place))


def how_it_ended(status: str, error: str | None, epochs: int) -> str:
    """How a run ended, in Markdown."""
    how = {"FINISHED": "finished", "STOPPED": "stopped early by the search", "KILLED": "stopped", "FAILED": "failed"}
    why = f" ({escaped(error, 300)})" if error and status != "FINISHED" else ""
    return f"{how.get(status, status.lower())} after {epochs} epochs{why}"


def model_card(
    config: TrainConfig, manifest: Manifest, entry: Metrics, *, run_id: str, checkpoint: StoragePath, place: StoragePath
) -> str:
    """A model's card, in Markdown. entry: the epoch that it is of; place: the folder of its run."""
    num_val, words = manifest.rows["val"], manifest.class_names or manifest.classes
    errors = [(ERRORS[name], percent(entry[name]), _interval(entry[name], num_val)) for name in ERRORS if name in entry]
    listed = ", ".join(escaped(name, LONGEST_VALUE) for name in words[:MOST_CLASSES])
    rest = f" and {len(words) - MOST_CLASSES} more" if len(words) > MOST_CLASSES else ""
    load = f"trained = alexnet.load({_shown(checkpoint)!r})\n"
    if checkpoint.local is None:  # which alexnet, that knows of no storage, does not read
        load = (
            f'folder = mlflow.artifacts.download_artifacts("runs:/{run_id}/model")\n'
            f'trained = alexnet.load(f"{{folder}}/artifacts/{NET}")\n'
        )
    use = (
        "import alexnet, mlflow\n\n"
        f"{load}"
        f'model = mlflow.pyfunc.load_model("runs:/{run_id}/model")\n'
        'model.predict([open("picture.jpg", "rb").read()])'
    )
    parts = [
        f"# {escaped(place.name)}",
        f"{net_line_of(config)} for {len(manifest.classes)} classes, as it was after epoch {entry['epoch']}."
        + (
            f" Its weights are a moving average over the updates, with a decay of {config.ema:g}." if config.ema else ""
        ),
        "## Errors",
        table(("error", "of the validation images", "95 % interval"), errors),
        f"Of {num_val} images, one crop from the centre of each. The intervals say how much chance there is in that "
        "many images. The epoch was chosen by the same images, which flatters it: expect more errors on others.",
        "## Data",
        data_line(manifest) + f". Stored at {manifest.image_size} pixels.",
        f"Classes: {listed}{rest}.",
        f"Licence of the data: {LICENCE}.",
        "## Use",
        code_block(use, "python"),
        code_block(f"mlflow models serve -m runs:/{run_id}/model --env-manager local --host 127.0.0.1 -p 5001"),
        "## Limits",
        "It answers with one of its classes whatever the picture shows, and its probabilities have not been "
        f"calibrated. A picture is resized to {manifest.image_size} pixels at its shorter side and cut to the centre: "
        "what is at the edges is not seen. Pictures unlike the training images are out of its reach. It has not been "
        "tested for bias.",
        "## Settings",
        code_block(redact_all(config.to_yaml()), "yaml"),
        "Repeat the run:",
        code_block(redact_all(repeating(place))),
    ]
    return "\n\n".join(parts) + "\n"


def _interval(error: float, num_val: int) -> str:
    low, high = error_interval(round(error * num_val), num_val)
    return f"{100 * low:.2f} to {percent(high)}"


def _shown(place: StoragePath) -> str:
    return redact_all(str(place))
