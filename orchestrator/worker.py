"""The training loop on one Ray Train worker."""

import math
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import alexnet

from . import checkpoints
from .config import TrainConfig, make_config
from .feed import Batch, Feed
from .shards import DamagedData, Manifest, read_manifest, read_mean_image

SHOW_EVERY_S = 0.5
LOG_EVERY_STEPS = 20  # points of train/step_loss in MLflow; on a GPU also how often the loss is read back
STUCK_STEPS = 50  # from then on a loss that is not below ln(classes) is worth a word
STUCK_MARGIN = 0.01


class Diverged(Exception):
    """The loss is no number any more; the message names the step."""


def train_worker(loop: dict[str, Any]) -> None:
    """What Ray Train calls on every worker.

    What is the same on all workers, and would be again, is reported and ends them all: impossible settings, damaged
    data, a diverged net. Anything else is raised, for Ray Train to restart them from the last checkpoint.
    """
    try:
        worker = Worker(make_config(**loop["config"]), Path(loop["data"]), loop)
    except (DamagedData, ValueError) as error:
        ray.get(loop["mailbox"].put.remote({"kind": "failed", "text": str(error)}))
        return
    try:
        worker.run()
    except Diverged as error:
        worker.tell("failed", text=str(error))
    worker.flush()


class Worker:
    """One rank: its copy of the net, its part of every batch."""

    def __init__(self, config: TrainConfig, folder: Path, loop: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.config, self.rank, self.world_size = config, context.get_world_rank(), context.get_world_size()
        self.manifest: Manifest = read_manifest(folder)
        self.num_classes = config.num_classes or len(self.manifest.classes)
        self.mailbox, self._sent, self.said_stuck = loop["mailbox"], None, False
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            alexnet.keep_freed_memory()
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))

        mean = torch.from_numpy(read_mean_image(folder, self.manifest)).to(self.device)
        self.subtract_mean = alexnet.MeanSubtraction(mean, config.input_size, config.pixel_scale)
        self.net = build_net(config, self.num_classes).to(self.device)
        self.optimizer = alexnet.PaperSGD(self.net.parameters(), config.lr, config.momentum, config.weight_decay)
        self.schedule = alexnet.plateau_schedule(self.optimizer, num_drops=config.lr_drops, patience=config.lr_patience)
        self.state = checkpoints.State()
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            with checkpoint.as_directory() as path:
                self.state = checkpoints.load(Path(path), self.net, self.optimizer, self.schedule)
        self.model = (
            DistributedDataParallel(self.net, gradient_as_bucket_view=True) if self.world_size > 1 else self.net
        )
        self.bf16 = self._agree(wants_bf16(config.precision, self.device))
        self.feed = Feed(
            folder, self.manifest, config, rank=self.rank, world_size=self.world_size,
            num_cpus=loop["feed_cpus"], num_tasks=loop["feed_tasks"],
        )  # fmt: skip

    def run(self) -> None:
        """Train from where the state is to the last epoch, validating and saving after each."""
        news = {"epoch": self.state.epoch, "history": self.state.history}
        self.tell("started", bf16=self.bf16, device=str(self.device), **news)
        self.feed.start(self.state.epoch)
        for epoch in range(self.state.epoch, self.config.epochs):
            metrics = self.train_epoch(epoch) | self.validate(epoch)
            self.schedule.step(metrics["val/top1_error"])
            self.state.epoch = epoch + 1
            metrics = {"epoch": epoch + 1, "step": self.state.step} | metrics
            self.state.history.append(metrics)
            self.tell("epoch", epochs=self.config.epochs, metrics=metrics, history=self.state.history)
            self.save(metrics)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training set; returns train/loss (mean over its images), train/lr, train/images_per_s."""
        torch.manual_seed(self.config.seed * 1_000_003 + epoch * 1_009 + self.rank)  # dropout: its own on every worker
        self.model.train()
        num_rows, steps = self.manifest.rows["train"], self.feed.num_steps("train")
        lr = self.optimizer.param_groups[0]["lr"]
        pending: list[Tensor] = []  # (2,) loss sum and images of each step since the last look, still on the device
        losses: list[float] = []
        images, start, shown = 0, time.monotonic(), 0.0
        for step, batch in enumerate(self.feed.batches("train", epoch)):
            size = min(self.config.global_batch_size, num_rows - step * self.config.global_batch_size)
            pending.append(self.update(batch, size))
            self.state.step += 1
            if self.device.type == "cpu" or len(pending) == LOG_EVERY_STEPS or step + 1 == steps:
                losses += self.look(pending, images_before=images, epoch=epoch)
                images, pending = step * self.config.global_batch_size + size, []
                rate = images / (time.monotonic() - start)
                if self.state.step % STUCK_STEPS == 0 or step + 1 == steps:
                    self.watch_for_a_stuck_net(losses)
                log = (step + 1) % LOG_EVERY_STEPS == 0
                if log or time.monotonic() - shown > SHOW_EVERY_S:
                    shown = time.monotonic()
                    recent = losses[-LOG_EVERY_STEPS:]
                    self.tell(
                        "step", epoch=epoch, epochs=self.config.epochs, step=step + 1, steps=steps, log=log,
                        total_step=self.state.step, loss=sum(recent) / len(recent), lr=lr, images_per_s=rate,
                    )  # fmt: skip
        assert images == num_rows, f"trained on {images} of {num_rows} images"
        weights = [self.config.global_batch_size] * (steps - 1) + [
            num_rows - (steps - 1) * self.config.global_batch_size
        ]
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / num_rows
        return {"train/loss": mean, "train/lr": lr, "train/images_per_s": num_rows / (time.monotonic() - start)}

    def update(self, batch: Batch, global_size: int) -> Tensor:
        """One step of the optimizer on the global batch's mean loss; returns this worker's (loss sum, images)."""
        scores, labels = self.scores(self.model, batch)
        loss_sum = F.cross_entropy(scores.float(), labels, reduction="sum")
        # data parallelism averages gradients over the workers, whose parts of a short batch may differ in size
        (loss_sum * (self.world_size / global_size)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.world_size == 1)  # DDP keeps its gradients in its buckets
        return torch.stack([loss_sum.detach(), torch.tensor(float(len(labels)), device=self.device)])

    @torch.no_grad()
    def validate(self, epoch: int) -> dict[str, float]:
        """Every row of val exactly once, centre crops; returns val/loss, val/top1_error, val/top5_error."""
        self.model.eval()
        total = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss sum, top-1 wrong, top-5 wrong, images
        for batch in self.feed.batches("val", epoch):
            scores, labels = self.scores(self.net, batch)
            loss_sum = F.cross_entropy(scores.float(), labels, reduction="sum")
            images = torch.tensor([len(labels)], device=self.device)
            total += torch.cat([loss_sum[None], alexnet.count_errors(scores.float(), labels), images])
        self.add_up(total)
        loss, top1, top5, count = total.tolist()
        if not math.isfinite(loss):  # the last update's doing, which no training loss has seen; nothing of it is saved
            raise Diverged(
                f"validation loss is {loss / count} after step {self.state.step} (epoch {epoch + 1}): {self._advice()}"
            )
        if count != self.manifest.rows["val"]:
            raise RuntimeError(f"validated {count:.0f} images where the manifest says {self.manifest.rows['val']}")
        return {"val/loss": loss / count, "val/top1_error": top1 / count, "val/top5_error": top5 / count}

    def scores(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch of uint8 crops to the device, to floats, through the net."""
        image, top, left, flip, label = (
            self._to_device(batch[name]) for name in ("image", "top", "left", "flip", "label")
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return model(self.subtract_mean(image, top, left, flip)), label

    def look(self, pending: list[Tensor], *, images_before: int, epoch: int) -> list[float]:
        """The mean loss of each pending step over all workers. Raises Diverged on all of them alike."""
        sums = torch.stack(pending).double()
        self.add_up(sums)
        losses = []
        first = self.state.step - len(pending) + 1
        for number, (loss_sum, count) in enumerate(sums.tolist(), start=first):
            if not math.isfinite(loss_sum):
                raise Diverged(f"loss is {loss_sum / count} at step {number} (epoch {epoch + 1}): {self._advice()}")
            losses.append(loss_sum / count)
        return losses

    def watch_for_a_stuck_net(self, losses: list[float]) -> None:
        """Say once that the loss is not below that of guessing: AlexNet's best-known failure."""
        recent, guess = losses[-LOG_EVERY_STEPS:], math.log(self.num_classes)
        mean = sum(recent) / len(recent)
        if self.said_stuck or self.state.step < STUCK_STEPS or mean < (1 - STUCK_MARGIN) * guess:
            return
        self.said_stuck = True
        self.tell(
            "warning",
            text=f"after {self.state.step} steps the loss is {mean:.4f}, no better than guessing, "
            f"ln({self.num_classes}) = {guess:.4f}. The paper's initialisation can lie still for long on small data; "
            "the remedy is --init he --pixel-scale 0.0156",
        )

    def save(self, metrics: dict[str, float]) -> None:
        """Report the epoch to Ray Train, with a checkpoint from rank 0."""
        if self.rank != 0:
            ray.train.report(metrics)
            return
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        checkpoints.save(folder, self.net, self.optimizer, self.schedule, self.state)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint-epoch-{self.state.epoch:04d}",
            delete_local_checkpoint_after_upload=True,
        )

    def tell(self, kind: str, **fields: Any) -> None:
        """Send an event to the driver, from rank 0 alone, without waiting."""
        if self.rank == 0:
            self._sent = self.mailbox.put.remote({"kind": kind} | fields)

    def flush(self) -> None:
        """Wait until the last event has arrived."""
        if self._sent is not None:
            ray.get(self._sent)

    def add_up(self, tensor: Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def _advice(self) -> str:
        return f"training diverged; try a lower --lr than {self.config.lr:g}"

    def _agree(self, wish: bool) -> bool:
        """True where every worker's is."""
        vote = torch.tensor(int(wish), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(vote, dist.ReduceOp.MIN)
        return bool(vote.item())

    def _to_device(self, array: Any) -> Tensor:
        return as_tensor(array).to(self.device, non_blocking=True)


def as_tensor(array: Any) -> Tensor:
    """A tensor over the array's memory, which may be read-only: the caller does not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def build_net(config: TrainConfig, num_classes: int) -> alexnet.AlexNet:
    """The net that the config describes."""
    lrn = alexnet.LRN(k=config.lrn_k, n=config.lrn_n, alpha=config.lrn_alpha, beta=config.lrn_beta)
    return alexnet.build(
        config.preset, num_classes, input_size=config.input_size, width=config.width, lrn=lrn,
        dropout=config.dropout, init=config.init, seed=config.seed,
    )  # fmt: skip


def wants_bf16(precision: str, device: torch.device) -> bool:
    """What `auto` means: bfloat16 on GPUs that have it and on CPUs with matrix units for it, else float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and _has_amx()


def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
