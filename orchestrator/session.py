"""A training job from its settings to its result: data checked, run tracked, progress shown, result written."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from alexnet import pictures
from alexnet.cost import estimate

from . import checkpoints
from .cluster import connect
from .config import TrainConfig
from .dataset import Dataset
from .exits import Interrupted, JobError, signals_deferred
from .mailbox import Event
from .placement import CPU_FLOPS, Node, choose_layout, ledger, make_plan, worker_counts
from .progress import TrainView, duration, percent, table
from .runs import RESULT, RunFolder
from .tracking import Tracker, tracking_uri, ui_command, without_password
from .trainer import Training

MAY_CHANGE = ("epochs", "workers", "layout", "device", "precision", "threads", "data", "max_failures")  # on resuming


def resumed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The settings of a run that goes on. Raises ValueError for a change that its checkpoint would contradict."""
    wrong = [name for name, value in changes.items() if name not in MAY_CHANGE and value != getattr(config, name)]
    if wrong:
        flag, allowed = wrong[0].replace("_", "-"), ", ".join("--" + name.replace("_", "-") for name in MAY_CHANGE)
        raise ValueError(f"--{flag}: cannot change when a run is resumed, only {allowed} can; start a new run instead")
    return config.changed(**changes)


def describe(config: TrainConfig, output: Path) -> str:
    """What a run would be, for --dry-run. Starts neither Ray nor MLflow. Raises ValueError of one line."""
    data = Dataset(config, output, verify=False)
    num_classes = data.num_classes(config)
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
    steps = -(-data.rows["train"] // config.global_batch_size)
    facts = [
        ("data", f"{config.data}: {data}"),
        ("parameters", f"{cost.num_parameters:,}"),
        ("steps", f"{steps} an epoch, {steps * config.epochs} in all"),
        (
            "arithmetic",
            f"{cost.training_flops * data.rows['train'] / 1e9:,.0f} GFLOP an epoch, "
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


def hours_of(config: TrainConfig, data: Dataset, epochs: int, cpus: int) -> str:
    """The time that the arithmetic of so many epochs takes on CPUs, to one digit; data and start-up not counted."""
    cost = estimate(
        num_classes=data.num_classes(config), input_size=config.input_size, width=config.width,
        global_batch_size=config.global_batch_size,
    )  # fmt: skip
    images = data.rows["train"] + data.rows["val"] / 3  # a forward pass is a third of a step
    return duration(epochs * images * cost.training_flops / (CPU_FLOPS * cpus))


class Session:
    """One run of jobs/train.py. What the user can have wrong is found when it is made.

    ValueError of one line for wrong settings, DamagedData for shards that are not what their manifest says.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, *, resume: bool, recipe: str | None) -> None:
        self.run, self.config, self.resume, self.recipe = run, config, resume, recipe
        self.view = TrainView()
        self.data = Dataset(config, run.output)
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
        self.data.prepare(self.config, say)
        manifest = self.data.manifest
        say(
            f"run {self.run.name}: {manifest.source}, {len(manifest.classes)} classes, "
            f"{manifest.rows['train']} train and {manifest.rows['val']} val images; "
            f"{self.config.workers} worker(s), global batch {self.config.global_batch_size}"
        )
        # the workers start while MLflow does; should that fail, they end with Ray
        with signals_deferred():
            training = Training(self.config, self.data.folder, self.run, self.data.num_classes(self.config))
        self.tracker.start(
            self.run.name,
            self.config,
            manifest,
            self.data.folder,
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
        config, manifest = self.config, self.data.manifest
        num_classes = self.data.num_classes(config)
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
            mean_image.write_bytes((self.data.folder / manifest.mean_image_file).read())
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
