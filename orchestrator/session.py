"""A training job from its settings to its result: data checked, run tracked, progress shown, result written."""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from alexnet import pictures
from alexnet.cost import estimate

from . import checkpoints, shards
from .cluster import connect
from .config import TrainConfig
from .exits import Interrupted, JobError, signals_deferred
from .mailbox import Event
from .placement import Node, choose_layout, ledger, make_plan, worker_counts
from .prepare import prepare
from .progress import TrainView, duration, percent, table
from .runs import RESULT, RunFolder
from .shards import Manifest, read_manifest
from .sources import open_source
from .storage import Place
from .tracking import Tracker, tracking_uri, ui_command, without_password
from .trainer import Training

EMBEDDED = "digits"
MAY_CHANGE = ("epochs", "workers", "layout", "device", "precision", "data", "max_failures")  # of a run that goes on


def data_folder(config: TrainConfig, output: Path) -> Place:
    """Where the run's shards are; the embedded digits are kept with the runs. Raises ValueError for an odd URI."""
    return Place.of(output.absolute() / "_data" / EMBEDDED if config.data == EMBEDDED else config.data)


def resumed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The settings of a run that goes on. Raises ValueError for a change that its checkpoint would contradict."""
    wrong = [name for name, value in changes.items() if name not in MAY_CHANGE and value != getattr(config, name)]
    if wrong:
        flag, allowed = wrong[0].replace("_", "-"), ", ".join("--" + name.replace("_", "-") for name in MAY_CHANGE)
        raise ValueError(f"--{flag}: cannot change when a run is resumed, only {allowed} can; start a new run instead")
    return config.changed(**changes)


def check_data(config: TrainConfig, folder: Place, manifest: Manifest) -> None:
    """Hold the settings against the data. Raises ValueError of one line."""
    shards.check_labels(folder, manifest, config.num_classes or len(manifest.classes))
    check_size(config, f"the images in {folder}", manifest.image_size, manifest.rows["train"])


def check_embedded(config: TrainConfig) -> None:
    """The same for the digits before they are prepared."""
    source = open_source(EMBEDDED)
    if config.num_classes is not None and config.num_classes < len(source.classes):
        raise ValueError(f"num_classes = {config.num_classes}: the {EMBEDDED} have {len(source.classes)} classes")
    check_size(config, f"the {EMBEDDED}", source.image_size, len(source.splits["train"]))


def check_size(config: TrainConfig, images: str, image_size: int, num_train: int) -> None:
    """Raises ValueError of one line where these images cannot be cut so, or the net not be laid over the workers."""
    if config.input_size > image_size:
        raise ValueError(
            f"input_size = {config.input_size}: above the {image_size} pixels of {images}; "
            f"choose at most {image_size}, or prepare the data with --image-size {config.input_size} or more"
        )
    if config.global_batch_size > num_train:
        raise ValueError(
            f"global_batch_size = {config.global_batch_size}: more than the {num_train} training images among {images}"
        )
    worker_counts(config)


def describe(config: TrainConfig, output: Path) -> str:
    """What a run would be, for --dry-run. Starts neither Ray nor MLflow. Raises ValueError of one line."""
    folder = data_folder(config, output)
    if config.data == EMBEDDED and (folder / shards.MANIFEST).size() is None:
        check_embedded(config)
        source = open_source(EMBEDDED)
        rows = {split: len(entries) for split, entries in source.splits.items()}
        classes, where = len(source.classes), "embedded, prepared at the first run"
    else:
        manifest = read_manifest(folder)
        check_data(config, folder, manifest)
        rows, classes, where = manifest.rows, len(manifest.classes), f"{folder}, digest {manifest.digest}"
    num_classes = config.num_classes or classes
    here = [Node("here", os.cpu_count() or 1, torch.cuda.device_count())]
    try:
        plan = make_plan(config, here, num_classes)
        reason = plan.reason if plan else f"no: too small for {config.workers} workers"
    except JobError as error:
        plan, reason = None, f"no: {error}"
    use_gpu = config.device == "gpu" or (config.device == "auto" and torch.cuda.is_available())
    layout = plan.layout if plan else choose_layout(config, worker_counts(config)[0], num_classes, here, use_gpu)[0]
    cost = estimate(
        num_classes=num_classes, input_size=config.input_size, width=config.width,
        global_batch_size=config.global_batch_size, layout=layout,
    )  # fmt: skip
    steps = -(-rows["train"] // config.global_batch_size)
    facts = [
        ("data", f"{config.data}: {rows['train']} train, {rows['val']} val, {classes} classes ({where})"),
        ("parameters", f"{cost.num_parameters:,}"),
        ("steps", f"{steps} an epoch, {steps * config.epochs} in all"),
        (
            "arithmetic",
            f"{cost.training_flops * rows['train'] / 1e9:,.0f} GFLOP an epoch, "
            f"{cost.training_flops / 1e9:.2f} an image",
        ),
        (
            "memory",
            f"{cost.memory_bytes / 1e9:.2f} GB a worker: weights, gradients and velocities of "
            f"{cost.part_parameters:,} parameters, and activations",
        ),
        ("on this machine", reason),
        *ledger(config, layout.workers, num_classes),
        ("checkpoint", f"{2 * 4 * cost.num_parameters / 1e6:.0f} MB; the best and the last are kept"),
    ]
    return f"{config.to_yaml()}\n{table(facts)}\n\nnothing was started (--dry-run)"


def _prepare_embedded(folder: Path) -> Manifest:
    """Make the digits beside their place and move them there whole; another run may be doing the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
        prepare(open_source(EMBEDDED), Place.of(Path(making, EMBEDDED)))
        with contextlib.suppress(OSError):  # it is there already
            os.rename(Path(making, EMBEDDED), folder)
    return read_manifest(Place.of(folder))


class Session:
    """One run of jobs/train.py. What the user can have wrong is found when it is made.

    ValueError of one line for wrong settings, DamagedData for shards that are not what their manifest says.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, *, resume: bool, recipe: str | None) -> None:
        self.run, self.config, self.resume, self.recipe = run, config, resume, recipe
        self.view = TrainView()
        self.folder = data_folder(config, run.output)
        self.embed = config.data == EMBEDDED and (self.folder / shards.MANIFEST).size() is None
        if not self.embed:
            self.manifest = read_manifest(self.folder)
            # of a remote one only names and sizes: its bytes are read once an epoch, not once more before the first
            shards.verify(self.folder, self.manifest, whole=self.folder.local is not None)
            check_data(config, self.folder, self.manifest)
        else:
            check_embedded(config)
        if run.path.exists() and not resume:
            run.create(config)  # says why not
        self.tracker = Tracker(tracking_uri())
        if resume:
            run.change(config)
        else:
            run.create(config)
        self.result = self.run.result()
        self.started = time.monotonic()

    def train(self) -> None:
        """Raises JobError or Interrupted; the MLflow run and the result then say FAILED or KILLED."""
        try:
            self._begin().follow(self.on_event)
            self._log_what_came_of_it()
        except Interrupted as stop:
            self._end("KILLED", f"stopped by {stop}")
            where = "" if self.run.output == Path("runs").absolute() else f" --output {self.run.output}"
            self.view.line.print(f"stopped; go on with: python jobs/train.py{where} --resume {self.run.name}")
            raise
        except BaseException as error:
            self._end("FAILED", str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}")
            raise
        self._end("FINISHED")
        self._show_results()

    def _begin(self) -> Training:
        """Ray, the embedded data if it is asked for, the workers, the MLflow run, the first result."""
        say = self.view.line.print
        connect()
        if self.embed:
            say(f"preparing the embedded digits in {self.folder}")
            assert self.folder.local is not None
            self.manifest = _prepare_embedded(self.folder.local)
            check_data(self.config, self.folder, self.manifest)
        say(
            f"run {self.run.name}: {self.manifest.source}, {len(self.manifest.classes)} classes, "
            f"{self.manifest.rows['train']} train and {self.manifest.rows['val']} val images; "
            f"{self.config.workers} worker(s), global batch {self.config.global_batch_size}"
        )
        # the workers start while MLflow does; should that fail, they end with Ray
        with signals_deferred():
            num_classes = self.config.num_classes or len(self.manifest.classes)
            training = Training(self.config, self.folder, self.run, num_classes)
        self.tracker.start(
            self.run.name,
            self.config,
            self.manifest,
            self.folder,
            run_id=self.result.get("mlflow_run_id"),
            warn=lambda text: self.view.event({"kind": "warning", "text": text}),
        )
        self.result |= {
            "name": self.run.name,
            "status": "RUNNING",
            "recipe": self.recipe or self.result.get("recipe"),
            "config": self.config.model_dump(),
            "mlflow_run_id": self.tracker.run_id,
            "mlflow_tracking_uri": without_password(self.tracker.uri),
        }
        self.run.write_result(self.result)
        return training

    def on_event(self, event: Event) -> None:
        if event["kind"] == "started":
            self._on_start(event)
        elif event["kind"] == "step" and event["log"]:
            self.tracker.log({"train/step_loss": event["loss"]}, step=event["total_step"])
        elif event["kind"] == "epoch":
            metrics = event["metrics"]
            self.tracker.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])
            self._keep(event["history"])
        elif event["kind"] == "stopped":
            where = f"{event['epoch']} epochs and {event['step']} steps"
            self.view.event({"kind": "note", "text": f"a checkpoint was saved after {where}"})
        elif event["kind"] == "finished":
            self.result |= {"checkpoint": event["checkpoint"], "best_checkpoint": event["best_checkpoint"]}
        self.view.event(event)

    def _keep(self, history: list[dict[str, float]]) -> None:
        """What is known after each epoch, into the result."""
        self.result |= {
            "metrics": history[-1],
            "best": min(history, key=lambda entry: entry["val/top1_error"]),
            "history": history,
            "images_per_s": history[-1]["train/images_per_s"],
        }
        self.run.write_result(self.result)

    def _on_start(self, event: Event) -> None:
        if event["history"]:  # the checkpoint may be ahead of what a killed driver had written down
            self._keep(event["history"])
        text = f"training on {event['device']} in {event['precision']}, {event['workers']} worker(s)"
        where = f"epoch {event['epoch']}" + (f" and {event['step']} steps" if event["step"] else "")
        if event["crashed"]:
            text = f"a worker was lost; going on from the last checkpoint, after {where}"
        elif event["epoch"] or event["step"]:
            text += f", resumed after {where}"
        self.view.event({"kind": "note", "text": text})

    def _log_what_came_of_it(self) -> None:
        history = self.result.get("history")
        if not history:
            return
        figure = pictures.learning_curves(history, self.run.name)
        figure.savefig(self.run.path / "learning_curves.png", dpi=120)
        self.tracker.log_picture(figure, "learning_curves.png")
        config, manifest = self.config, self.manifest
        num_classes = config.num_classes or len(manifest.classes)
        build = {
            "preset": config.preset,
            "num_classes": num_classes,
            "input_size": config.input_size,
            "width": config.width,
            "dropout": config.dropout,
            "lrn": {"k": config.lrn_k, "n": config.lrn_n, "alpha": config.lrn_alpha, "beta": config.lrn_beta},
        }
        description = {"build": build, "pixel_scale": config.pixel_scale, "classes": manifest.classes}
        weights = Path(self.result["best_checkpoint"] or self.result["checkpoint"], checkpoints.WEIGHTS)
        with tempfile.TemporaryDirectory() as temporary:
            mean_image = Path(temporary, manifest.mean_image_file)
            mean_image.write_bytes((self.folder / manifest.mean_image_file).read())
            self.tracker.log_model(weights, mean_image, description, manifest.image_size, num_classes)

    def _end(self, status: str, error: str | None = None) -> None:
        self.result |= {"status": status, "error": error, "elapsed_s": time.monotonic() - self.started}
        if status != "FINISHED":
            self.result["checkpoint"] = self.run.latest_checkpoint()
        self.run.write_result(self.result)
        self.tracker.finish(status, error)

    def _show_results(self) -> None:
        result: dict[str, Any] = self.result
        last, best = result["metrics"], result["best"]
        rows = [
            (
                "top-1 error",
                f"{percent(last['val/top1_error'])} (best {percent(best['val/top1_error'])}, epoch {best['epoch']})",
            ),
            ("top-5 error", percent(last["val/top5_error"])),
            ("loss", f"train {last['train/loss']:.4f}, validation {last['val/loss']:.4f}"),
            ("speed", f"{result['images_per_s']:.0f} images/s in the last epoch"),
            ("time", duration(result["elapsed_s"])),
            ("checkpoint", result["checkpoint"]),
            ("result", str(self.run.path / RESULT)),
            ("MLflow run", result["mlflow_run_id"]),
            ("see it", ui_command(self.tracker.uri)),
        ]
        self.view.line.print(f"\nresults after {last['epoch']} epochs\n{table(rows)}")
        sys.stdout.flush()
