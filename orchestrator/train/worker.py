"""The training loop on one Ray Train worker."""

import contextlib
import logging
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

import alexnet
from alexnet.layouts import Layout, ShardedNet
from alexnet.trained import write_description
from orchestrator.base import logs
from orchestrator.base.environment import cpu_model
from orchestrator.base.exits import lacks_memory, no_memory
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig, make_config
from orchestrator.data.feed import Feed
from orchestrator.data.order import rows_of_pass
from orchestrator.data.shards import DamagedData, Manifest, read_manifest, read_mean_image
from orchestrator.train import checkpoints, record
from orchestrator.train.classes import has_top5, loss_weights
from orchestrator.train.driver_link import STOP_CODES, DriverLink
from orchestrator.train.keep import is_kept, keep_weights
from orchestrator.train.mailbox import SAVE
from orchestrator.train.messages import EpochEnded, Failed, Started, Step, Stopped, Warned, WorkerPayload
from orchestrator.train.model import build_net, describe, make_optimizer, make_warmup
from orchestrator.train.pretrained import Pretrained
from orchestrator.train.profile import NoProfile, Profile, profile_of
from orchestrator.train.rendezvous import rendezvous
from orchestrator.train.start import load_start
from orchestrator.train.step import Pending, WorkerStep
from orchestrator.train.stored import ERROR, NEVER_BEST
from orchestrator.train.stuck import StuckWatch

SHOW_EVERY_S = 0.5
LOG_EVERY_STEPS = 20  # points of train/step_loss in MLflow; on a GPU also how often the loss is read back
PASSES = ("train", "val", "probe")  # of each epoch; the last reads training images as validation does

log = logging.getLogger(__name__)


class Diverged(Exception):
    """The loss is NaN or infinite; the message names the step."""


class StopRequested(Exception):
    """The driver asked all workers to stop; a checkpoint has been saved if it asked for one."""


def train_worker(loop: dict[str, Any]) -> None:
    """What Ray Train calls on every worker, with a WorkerPayload as `payload`.

    A failure that is the same on all workers and would recur is reported and ends them all: impossible settings,
    damaged data, a diverged net. Anything else is raised, and Ray Train restarts them from the last checkpoint.
    """
    payload: WorkerPayload = loop["payload"]
    link = DriverLink(payload.mailbox, payload.topic, ray.train.get_context().get_world_rank())
    logs.forward(link.log)
    try:
        _train(payload, link)
    except BaseException as error:
        log.exception("worker failed")
        if lacks_memory(error):
            link.report_failure(why_no_memory(error, payload.config["global_batch_size"], payload.config["accumulate"]))
            return
        if isinstance(error, Exception):
            link.report_error(error)
        raise
    finally:
        link.flush_log()


def why_no_memory(error: BaseException, global_batch_size: int, accumulate: int = 1) -> str:
    """One line for the user."""
    less = f"a --global-batch-size below {global_batch_size}, more workers, or an --accumulate above {accumulate}"
    return no_memory(error, f"{less}, takes less")


def _train(payload: WorkerPayload, link: DriverLink) -> None:
    try:
        worker = Worker(make_config(**payload.config), StoragePath(payload.data), payload, link)
    except (DamagedData, ValueError) as error:
        log.debug("worker cannot start", exc_info=True)
        link.report_failure(str(error))
        return
    try:
        worker.run()
    except Diverged as error:
        link.report_event(Failed(text=str(error)))
    except DamagedData as error:  # in this worker's part; the others wait for it, and are ended
        log.debug("damaged data", exc_info=True)
        link.report_failure(str(error))
    except StopRequested:
        link.report_event(Stopped(epoch=worker.state.epoch, step=len(worker.state.losses)))
    finally:
        worker.feed.close()
    link.flush()


class Worker:
    """One rank: its part of the net, its part of every batch."""

    profile: Profile | NoProfile = NoProfile()

    def __init__(self, config: TrainConfig, folder: StoragePath, payload: WorkerPayload, link: DriverLink) -> None:
        context = ray.train.get_context()
        self.config, self.link, self.run_folder = config, link, StoragePath(payload.run)
        self.layout = Layout(payload.layout, context.get_world_size())
        self.manifest: Manifest = read_manifest(folder)
        self.feed = Feed(
            folder, self.manifest, config, rank=link.rank, world_size=self.layout.workers,
            num_cpus=payload.feed_cpus, num_tasks=payload.feed_tasks, num_concurrent=payload.num_concurrent,
            passes=PASSES,
        )  # fmt: skip
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            alexnet.keep_freed_memory()
            torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        self.agreed = rendezvous(config, self.layout, ray.get_runtime_context().get_node_id(), self.device)

        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.precision = "bf16" if self.agreed.bf16 else {torch.float32: "fp32", torch.float64: "fp64"}[dtype]
        num_classes = config.num_classes or len(self.manifest.classes)
        self.net = ShardedNet(build_net(config, num_classes).to(self.device, dtype), self.layout, link.rank)
        self.optimizer = make_optimizer(config, self.net.part, self.net.whole_sums)
        self.schedule = alexnet.plateau_schedule(self.optimizer, num_drops=config.lr_drops, patience=config.lr_patience)
        pretrained, mean_image = Pretrained.of_run(self.run_folder), read_mean_image(folder, self.manifest)
        self.mean_image = mean_image if pretrained is None else pretrained.mean_image(mean_image)
        mean = torch.from_numpy(self.mean_image).to(self.device)
        weights = loss_weights(config, self.manifest, num_classes)
        self.warmup = make_warmup(config, self.feed.num_steps("train"))
        self.average = alexnet.WeightAverage(self.net.part, config.ema) if config.ema else None
        self.step = WorkerStep(
            self.net, self.optimizer, mean, config, self.manifest.rows, bf16=self.agreed.bf16,
            class_weights=None if weights is None else torch.tensor(weights, dtype=dtype, device=self.device),
            warmup=self.warmup, average=self.average,
        )  # fmt: skip
        self.profile = profile_of(payload.profile, self.net, self.device, self.link.send_profile)
        self.step.span = self.profile.span
        self.num_classes = num_classes
        self.wrong_by_class: list[int] = []  # at top 1, in the last validation
        self.stuck = StuckWatch(num_classes, config.init)
        self.state = load_start(
            payload.start, pretrained, config, self.manifest, self.net, self.optimizer, self.schedule, self.average
        )
        if self.state.losses and self.state.digest != self.manifest.digest:
            raise ValueError(
                f"the checkpoint is from within epoch {self.state.epoch + 1} on data {self.state.digest}, and --data "
                f"{folder} is {self.manifest.digest}: finish the epoch on the same data first"
            )
        self.state.digest = self.manifest.digest

    def run(self) -> None:
        """Train from where the state is to the last epoch, validating and saving after each."""
        state = self.state
        self.feed.start(state.epoch, len(state.losses))
        self.link.report_event(
            Started(
                precision=self.precision, device=str(self.device), nodes=self.agreed.nodes,
                epoch=state.epoch, step=len(state.losses), history=state.history,
            )
        )  # fmt: skip
        log.info("rank %d of %d on %s in %s", self.link.rank, self.layout.workers, self.device, self.precision)
        for epoch in range(state.epoch, self.config.epochs):
            metrics = self.train_epoch(epoch)
            with self.profile.span("validation"):
                metrics |= self.validate(epoch) | self.probe(epoch)
            if state.step > self.warmup.steps:  # low rates explain why the error stands still
                self.schedule.step(metrics["val/top1_error"])
            state.epoch, state.losses = epoch + 1, []
            metrics = {"epoch": epoch + 1, "step": state.step} | metrics
            state.history.append(metrics)
            self.link.report_event(
                EpochEnded(
                    epochs=self.config.epochs, metrics=metrics, history=state.history, wrong=self.wrong_by_class
                )
            )  # fmt: skip
            with self.profile.span("checkpoint"):
                self.save(metrics)
            self.profile.epoch_ended(is_last=epoch + 1 == self.config.epochs)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training set, or the rest of it; returns train/loss (mean over its images), train/lr,
        train/images_per_s. Raises StopRequested or Diverged."""
        self.net.train()
        steps, losses = self.feed.num_steps("train"), self.state.losses
        first = len(losses)
        pending: list[Pending] = []  # steps whose losses are still on the device
        start, shown = time.monotonic(), 0.0
        batches = self.profile.steps(self.feed.batches("train", epoch, first), self.state.step)
        for step, batch in enumerate(self.step.on_device(batches), start=first):
            loss_sum, images = self.step.update(batch, step, self.state.step)
            pending.append((loss_sum, images, self.link.poll_stop_request()))
            self.state.step += 1
            # counted from the epoch's first step, not from where it was resumed
            is_point, is_last = (step + 1) % LOG_EVERY_STEPS == 0, step + 1 == steps
            if not (self.device.type == "cpu" or is_point or is_last):
                continue
            stop = self.sync_losses(pending, epoch=epoch)
            is_warm = self.state.step > self.warmup.steps
            if is_warm and self.stuck.is_due(self.state.step, len(pending), last=is_last):
                self._warn_if_stuck()
            pending = []
            if is_point or time.monotonic() - shown > SHOW_EVERY_S:
                shown = time.monotonic()
                images_per_s = (step + 1 - first) * self.config.global_batch_size / (shown - start)
                self._report_step(epoch, step, images_per_s, is_point=is_point)
            self.stop_if(stop)
        sizes = [self.step.size_of("train", step) for step in range(steps)]
        assert len(losses) == steps, f"epoch {epoch + 1}: {len(losses)} of {steps} steps were made"
        mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
        images_per_s = sum(sizes[first:]) / (time.monotonic() - start)
        return {"train/loss": mean, "train/lr": self.lr, "train/images_per_s": images_per_s}

    def validate(self, epoch: int) -> dict[str, float]:
        """Every row of val exactly once, centre crops; returns val/loss, val/top1_error and, of more than five classes,
        val/top5_error. Sets wrong_by_class.

        Raises StopRequested or Diverged.
        """
        loss, top1, top5, count, *by_class = self._evaluate("val", epoch)
        if not math.isfinite(loss):  # from the last update, which no training loss has seen; nothing of it is saved
            raise Diverged(
                f"validation loss is {loss / count} after step {self.state.step} (epoch {epoch + 1}): {self._advice()}"
            )
        self.wrong_by_class = [int(wrong) for wrong in by_class]
        top5_error = {"val/top5_error": top5 / count} if has_top5(self.num_classes) else {}
        return {"val/loss": loss / count, "val/top1_error": top1 / count, **top5_error}

    def probe(self, epoch: int) -> dict[str, float]:
        """A part of the training images as they are validated, the same in every epoch; returns train/top1_error.

        Raises StopRequested; the epoch's validation is then repeated when the run is resumed.
        """
        _, top1, _, count, *_ = self._evaluate("probe", epoch)
        return {"train/top1_error": top1 / count}

    @torch.no_grad()
    def _evaluate(self, split: str, epoch: int) -> list[float]:
        """What `WorkerStep.evaluate` counts, over every row of a pass exactly once, with the average of the weights if
        there is one. Raises StopRequested."""
        self.net.eval()
        total = torch.zeros(4 + self.num_classes, dtype=torch.float64, device=self.device)
        stop = 0.0
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            batches = self.profile.batches(self.feed.batches(split, epoch))
            for step, batch in enumerate(self.step.on_device(batches)):
                if step % LOG_EVERY_STEPS == 0:
                    stop = self.link.all_reduce_stop(self.device, self.layout.workers)
                    if stop:
                        break
                total += self.step.evaluate(batch, step, split)
        self.stop_if(stop)  # here, where the net has its own weights: it may save them
        found = self.step.all_reduce_total(total)
        wanted = rows_of_pass(split, self.manifest.rows)
        if found[3] != wanted:
            raise RuntimeError(f"{split}: {found[3]:.0f} images were evaluated where the manifest says {wanted}")
        return found

    def save(self, metrics: dict[str, float]) -> None:
        """Report to Ray Train, with a checkpoint from rank 0, to which its group contributes."""
        if self.link.rank not in self.layout.group_of(0):
            ray.train.report(metrics)
            return
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-")) if self.link.rank == 0 else None
        checkpoints.save(folder, self.net, self.optimizer, self.schedule, self.state, self.average)
        if folder is None:
            ray.train.report(metrics)
            return
        description = describe(self.config, self.manifest, self.num_classes, self.state.epoch)
        write_description(folder, description, self.mean_image)
        record.seal(folder, self.made_with(), self.config.model_dump(mode="json"))
        if not self.state.losses and is_kept(self.state.epoch, self.config.keep_every):
            keep_weights(folder, self.run_folder, self.state.epoch)
        name = checkpoints.checkpoint_name(self.state.epoch, len(self.state.losses))
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            delete_local_checkpoint_after_upload=True,
        )
        log.info("saved %s", name)

    def made_with(self) -> dict[str, str | int]:
        """What a checkpoint's numbers come from, for its record."""
        return {
            "version": alexnet.__version__,
            "torch": torch.__version__,
            "ray": ray.__version__,
            "cpu": cpu_model(),
            "device": str(self.device),
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "layout": self.layout.kind,
            "workers": self.layout.workers,
            "data": self.manifest.digest,
        }

    def sync_losses(self, pending: list[Pending], *, epoch: int) -> float:
        """Sum the pending steps over all workers and append their mean losses to the state's.

        Returns the stop request, the same on all workers. Raises Diverged on all of them alike.
        """
        with self.profile.span("exchange"):
            sums = self.step.all_reduce(pending)
        first = self.state.step - len(pending) + 1
        for number, (loss_sum, count, _) in enumerate(sums, start=first):
            wanted = self.step.size_of("train", len(self.state.losses))
            assert count == wanted, f"step {number} was made on {count:.0f} images, not {wanted}"
            if not math.isfinite(loss_sum):
                raise Diverged(f"loss is {loss_sum / count} at step {number} (epoch {epoch + 1}): {self._advice()}")
            self.state.losses.append(loss_sum / count)
        return max(stop for *_, stop in sums)

    def stop_if(self, request: float) -> None:
        """On a stop request, which all workers have alike: save if it says so, and raise StopRequested."""
        if request == STOP_CODES[SAVE]:
            self.save({ERROR: NEVER_BEST})
        if request:
            raise StopRequested

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate * self.warmup.factor(self.state.step)

    def _report_step(self, epoch: int, step: int, images_per_s: float, *, is_point: bool) -> None:
        recent = self.state.losses[-LOG_EVERY_STEPS:]
        self.link.report_event(
            Step(
                epoch=epoch, epochs=self.config.epochs, step=step + 1, steps=self.feed.num_steps("train"),
                total_step=self.state.step, loss=sum(recent) / len(recent), lr=self.lr, images_per_s=images_per_s,
                log=is_point,
            )
        )  # fmt: skip
        if is_point and self.link.rank == 0:  # all ranks have the same
            log.debug("epoch %d, step %d: loss %.6f", epoch + 1, step + 1, recent[-1])

    def _warn_if_stuck(self) -> None:
        text = self.stuck.check(self.state.step, self.state.losses)
        if text is not None:
            self.link.report_event(Warned(text=text))

    def _advice(self) -> str:
        return f"training diverged; try a lower --lr than {self.config.lr:g}"
