"""The training loop on one Ray Train worker."""

import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import alexnet
from alexnet import augment
from alexnet.dropout import BatchPosition
from alexnet.layouts import Layout, ShardedNet
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig, make_config
from orchestrator.data.feed import Feed
from orchestrator.data.reader import Batch
from orchestrator.data.shards import DamagedData, Manifest, read_manifest, read_mean_image
from orchestrator.train import checkpoints, messages
from orchestrator.train.driver_link import STOP_CODES
from orchestrator.train.mailbox import SAVE
from orchestrator.train.messages import EpochEnded, Failed, Started, Step, Warned, WorkerPayload
from orchestrator.train.model import build_net
from orchestrator.train.rendezvous import wants_bf16
from orchestrator.train.step import CUT, as_tensor
from orchestrator.train.stuck import STUCK_MARGIN, STUCK_REMEDIES, STUCK_STEPS

SHOW_EVERY_S = 0.5
LOG_EVERY_STEPS = 20  # points of train/step_loss in MLflow; on a GPU also how often the loss is read back
NEVER_BEST = 2.0  # error of a checkpoint without validation; infinity would become null on Ray's disk


class Diverged(Exception):
    """The loss is no number any more; the message names the step."""


class Stopped(Exception):
    """The driver asked all workers to stop; a checkpoint has been saved, if it wished one."""


def train_worker(loop: dict[str, Any]) -> None:
    """What Ray Train calls on every worker.

    What is the same on all workers, and would be again, is reported and ends them all: impossible settings, damaged
    data, a diverged net. Anything else is raised, for Ray Train to restart them from the last checkpoint.
    """
    payload: WorkerPayload = loop["payload"]
    try:
        worker = Worker(make_config(**payload.config), StoragePath(payload.data), payload)
    except (DamagedData, ValueError) as error:
        _report(payload, error)
        return
    try:
        worker.run()
    except Diverged as error:
        worker.report_event(Failed(text=str(error)))
    except DamagedData as error:  # in this worker's part; the others wait for it, and are ended
        _report(payload, error)
    except Stopped:
        worker.report_event(messages.Stopped(epoch=worker.state.epoch, step=len(worker.state.losses)))
    finally:
        worker.feed.close()
    worker.flush()


def _report(payload: WorkerPayload, error: Exception) -> None:
    ray.get(payload.mailbox.put.remote(payload.topic, Failed(text=str(error))))


class Worker:
    """One rank: its part of the net, its part of every batch."""

    def __init__(self, config: TrainConfig, folder: StoragePath, payload: WorkerPayload) -> None:
        context = ray.train.get_context()
        self.config, self.rank, self.world_size = config, context.get_world_rank(), context.get_world_size()
        self.layout = Layout(payload.layout, self.world_size)
        self.manifest: Manifest = read_manifest(folder)
        self.num_classes = config.num_classes or len(self.manifest.classes)
        self.mailbox, self.topic = payload.mailbox, payload.topic
        self._sent, self.said_stuck, self.stop_code = None, False, 0.0
        self.feed = Feed(
            folder, self.manifest, config, rank=self.rank, world_size=self.world_size,
            num_cpus=payload.feed_cpus, num_tasks=payload.feed_tasks, num_concurrent=payload.num_concurrent,
        )  # fmt: skip
        checkpoint, start = ray.train.get_checkpoint(), payload.start
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            alexnet.keep_freed_memory()
            torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        self.nodes = self._rendezvous()

        mean = torch.from_numpy(read_mean_image(folder, self.manifest)).to(self.device)
        self.subtract_mean = alexnet.MeanSubtraction(mean, config.input_size, config.pixel_scale)
        noisy = config.color_noise == "code2012"
        self.divisors = {"train": augment.CODE2012_SHRINK if noisy else 1.0, "val": 1.0}
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        net = build_net(config, self.num_classes).to(self.device, self.dtype)
        self.placed = ShardedNet(net, self.layout, self.rank)
        self.optimizer = alexnet.PaperSGD(self.placed.parameters(), config.lr, config.momentum, config.weight_decay)
        self.schedule = alexnet.plateau_schedule(self.optimizer, num_drops=config.lr_drops, patience=config.lr_patience)
        self.state = checkpoints.State()
        if checkpoint:
            with checkpoint.as_directory() as path:
                self.state = checkpoints.load(Path(path), self.placed, self.optimizer, self.schedule)
        elif start:  # another run's weights under this run's settings
            with StoragePath(start.checkpoint).as_local_dir() as path:
                self.state = checkpoints.load(path, self.placed, self.optimizer, self.schedule)
            checkpoints.scale_rate(config.lr / start.lr, self.optimizer, self.schedule)
        if self.state.losses and self.state.digest != self.manifest.digest:
            raise ValueError(
                f"the checkpoint lies within epoch {self.state.epoch + 1} on data {self.state.digest}, and --data "
                f"{folder} is {self.manifest.digest}: finish the epoch on the same data first"
            )
        self.state.digest = self.manifest.digest

    def _rendezvous(self) -> list[str]:
        """Compare notes with the other workers: agrees on the precision, returns the node of every rank.

        Raises ValueError, on all alike, where they are not placed as the layout needs them.
        """
        gpu = str(torch.cuda.get_device_properties(self.device).uuid) if self.device.type == "cuda" else None
        mine = (ray.get_runtime_context().get_node_id(), gpu, wants_bf16(self.config.precision, self.device))
        all_of_them: list[Any] = [mine]
        if self.world_size > 1:
            all_of_them = [None] * self.world_size
            # by gloo even where there are GPUs: NCCL would fail at what is to be found out here
            gloo: Any = dist.new_group(backend="gloo")
            dist.all_gather_object(all_of_them, mine, group=gloo)
        nodes, gpus, wishes = (list(column) for column in zip(*all_of_them, strict=True))
        self.bf16 = all(wishes)
        if gpu is not None and len(set(gpus)) < self.world_size:
            twice = next(uuid for uuid in gpus if gpus.count(uuid) > 1)
            ranks = " and ".join(str(rank) for rank, uuid in enumerate(gpus) if uuid == twice)
            raise ValueError(
                f"workers {ranks} share one GPU, over which NCCL cannot speak: give each worker a GPU of its own, "
                "or say --device cpu"
            )
        if self.layout.kind == "columns" and not self.config.spread:
            for rank in range(0, self.world_size, self.layout.group_size):
                homes = {nodes[other] for other in self.layout.group_of(rank)}
                if len(homes) > 1:
                    raise ValueError(
                        f"workers {rank} and {rank + 1} hold the columns of one net but are on different nodes: each "
                        f"node needs room for {self.layout.group_size} workers; or say --layout data, or --spread"
                    )
        return nodes

    def run(self) -> None:
        """Train from where the state is to the last epoch, validating and saving after each."""
        self.feed.start(self.state.epoch, len(self.state.losses))
        precision = "bf16" if self.bf16 else {torch.float32: "fp32", torch.float64: "fp64"}[self.dtype]
        self.report_event(
            Started(
                precision=precision, device=str(self.device), nodes=self.nodes, epoch=self.state.epoch,
                step=len(self.state.losses), history=self.state.history,
            )
        )  # fmt: skip
        for epoch in range(self.state.epoch, self.config.epochs):
            metrics = self.train_epoch(epoch) | self.validate(epoch)
            self.schedule.step(metrics["val/top1_error"])
            self.state.epoch, self.state.losses = epoch + 1, []
            metrics = {"epoch": epoch + 1, "step": self.state.step} | metrics
            self.state.history.append(metrics)
            self.report_event(EpochEnded(epochs=self.config.epochs, metrics=metrics, history=self.state.history))
            self.save(metrics)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training set, or what is left of it; returns train/loss (mean over its images), train/lr,
        train/images_per_s. Raises Stopped or Diverged."""
        self.placed.train()
        steps, global_size = self.feed.num_steps("train"), self.config.global_batch_size
        lr, losses = self.optimizer.param_groups[0]["lr"], self.state.losses
        first = len(losses)
        pending: list[Tensor] = []  # (3,) of each step since the last look, still on the device
        start, shown = time.monotonic(), 0.0
        for step, batch in enumerate(self.feed.batches("train", epoch, first), start=first):
            pending.append(self.update(batch, step))
            self.state.step += 1
            if self.device.type == "cpu" or len(pending) == LOG_EVERY_STEPS or step + 1 == steps:
                stop = self.sync_losses(pending, epoch=epoch)
                pending = []
                if self.state.step % STUCK_STEPS == 0 or step + 1 == steps:
                    self.watch_for_a_stuck_net(losses)
                log = (step + 1) % LOG_EVERY_STEPS == 0
                if log or time.monotonic() - shown > SHOW_EVERY_S:
                    shown = time.monotonic()
                    recent = losses[-LOG_EVERY_STEPS:]
                    self.report_event(Step(
                        epoch=epoch, epochs=self.config.epochs, step=step + 1, steps=steps, log=log,
                        total_step=self.state.step, loss=sum(recent) / len(recent), lr=lr,
                        images_per_s=(step + 1 - first) * global_size / (shown - start),
                    ))  # fmt: skip
                self.stop(stop)
        sizes = [self.size_of("train", step) for step in range(steps)]
        assert len(losses) == steps, f"epoch {epoch + 1}: {len(losses)} of {steps} steps were made"
        mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
        images_per_s = sum(sizes[first:]) / (time.monotonic() - start)
        return {"train/loss": mean, "train/lr": lr, "train/images_per_s": images_per_s}

    def update(self, batch: Batch, step: int) -> Tensor:
        """One step of the optimizer on the global batch's mean loss; returns what `sync_losses` sums over the
        workers: loss and number of images, from one worker of each group, and whether this one was told to stop."""
        scores, labels = self.scores("train", step, batch)
        loss_sum = F.cross_entropy(scores, labels, reduction="sum")
        torch.autograd.backward(loss_sum / self.size_of("train", step))
        self.optimizer.step()
        self.placed.zero_grad()
        mine = torch.tensor([float(len(labels)) * self.placed.is_group_leader, self.poll_stop_request()])
        return torch.cat([loss_sum.detach()[None].double() * self.placed.is_group_leader, mine.to(self.device)])

    @torch.no_grad()
    def validate(self, epoch: int) -> dict[str, float]:
        """Every row of val exactly once, centre crops; returns val/loss, val/top1_error, val/top5_error.

        Raises Stopped or Diverged.
        """
        self.placed.eval()
        total = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss sum, top-1 wrong, top-5 wrong, images
        for step, batch in enumerate(self.feed.batches("val", epoch)):
            if step % LOG_EVERY_STEPS == 0:
                self.stop(self.all_reduce_stop())
            scores, labels = self.scores("val", step, batch)
            if self.placed.is_group_leader:
                loss_sum = F.cross_entropy(scores, labels, reduction="sum")
                images = torch.tensor([len(labels)], device=self.device)
                total += torch.cat([loss_sum[None], alexnet.count_errors(scores, labels), images])
        self.all_reduce_sum(total)
        loss, top1, top5, count = total.tolist()
        if not math.isfinite(loss):  # the last update's doing, which no training loss has seen; nothing of it is saved
            raise Diverged(
                f"validation loss is {loss / count} after step {self.state.step} (epoch {epoch + 1}): {self._advice()}"
            )
        if count != self.manifest.rows["val"]:
            raise RuntimeError(f"validated {count:.0f} images where the manifest says {self.manifest.rows['val']}")
        return {"val/loss": loss / count, "val/top1_error": top1 / count, "val/top5_error": top5 / count}

    def scores(self, split: str, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch of uint8 crops to the device, to floats, through the net: the scores and labels of the images of
        this worker's group, in the order of the global batch."""
        slices = [self.feed.rank_slice(split, step, rank) for rank in self.layout.group_of(self.rank)]
        sizes = [last - first for first, last in slices]
        info = torch.from_numpy(np.stack([batch[name] for name in CUT], axis=1, dtype=np.int32, casting="unsafe"))
        image, info = self._to_device(batch["image"]), info.to(self.device)
        top, left, flip = self.placed.share_images(info[:, :3], sizes).unbind(1)
        labels = self.placed.share_labels(info[:, 3:], sizes).long().flatten()
        begin = step * self.config.global_batch_size
        position = torch.arange(slices[0][0] - begin, slices[-1][1] - begin, device=self.device)
        where = BatchPosition(self.config.seed, self.state.step, position)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            images = self.placed.share_images(image, sizes)
            x = self.subtract_mean(images, top, left, flip.bool(), divisor=self.divisors[split])
            scores = self.placed(x.to(self.dtype), where, sizes)
        return scores.to(self.dtype), labels

    def size_of(self, split: str, step: int) -> int:
        """Images of a global batch; the last of a pass may be smaller."""
        return min(self.config.global_batch_size, self.manifest.rows[split] - step * self.config.global_batch_size)

    def sync_losses(self, pending: list[Tensor], *, epoch: int) -> float:
        """Add up the pending steps over all workers and append their mean losses to the state's.

        Returns what the workers were told about stopping. Raises Diverged on all of them alike.
        """
        sums = torch.stack(pending)
        self.all_reduce_sum(sums)
        first = self.state.step - len(pending) + 1
        for number, (loss_sum, count, _) in enumerate(sums.tolist(), start=first):
            wanted = self.size_of("train", len(self.state.losses))
            assert count == wanted, f"step {number} was made on {count:.0f} images, not {wanted}"
            if not math.isfinite(loss_sum):
                raise Diverged(f"loss is {loss_sum / count} at step {number} (epoch {epoch + 1}): {self._advice()}")
            self.state.losses.append(loss_sum / count)
        return float(sums[:, 2].max())

    def stop(self, told: float) -> None:
        """Where all are told to, save where the run is, within an epoch or before its validation; and raise Stopped."""
        if told == STOP_CODES[SAVE]:
            self.save({"val/top1_error": NEVER_BEST})
        if told:
            raise Stopped

    def all_reduce_stop(self) -> float:
        told = torch.tensor([self.poll_stop_request()], device=self.device)
        self.all_reduce_sum(told)
        return float(told.item())

    def poll_stop_request(self) -> float:
        """What the driver has asked for, of STOP_CODES, as far as rank 0 knows from the answer to its last event; 0 on
        the others, so that a sum over all is what one was told."""
        if self._sent is not None and not self.stop_code and ray.wait([self._sent], timeout=0)[0]:
            self.stop_code = STOP_CODES.get(ray.get(self._sent), 0.0)
        return self.stop_code

    def watch_for_a_stuck_net(self, losses: list[float]) -> None:
        """Say once that the loss is not below that of guessing: AlexNet's best-known failure."""
        recent, guess = losses[-LOG_EVERY_STEPS:], math.log(self.num_classes)
        mean = sum(recent) / len(recent)
        if self.said_stuck or self.state.step < STUCK_STEPS or mean < (1 - STUCK_MARGIN) * guess:
            return
        self.said_stuck = True
        self.report_event(Warned(
            text=f"after {self.state.step} steps the loss is {mean:.4f}, no better than guessing, "
            f"ln({self.num_classes}) = {guess:.4f}. " + STUCK_REMEDIES[self.config.init],
        ))  # fmt: skip

    def save(self, metrics: dict[str, float]) -> None:
        """Report to Ray Train, with a checkpoint from rank 0, to which its group contributes."""
        if self.rank not in self.layout.group_of(0):
            ray.train.report(metrics)
            return
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-")) if self.rank == 0 else None
        checkpoints.save(folder, self.placed, self.optimizer, self.schedule, self.state)
        if folder is None:
            ray.train.report(metrics)
            return
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=checkpoints.checkpoint_name(self.state.epoch, len(self.state.losses)),
            delete_local_checkpoint_after_upload=True,
        )

    def report_event(self, event: messages.Event) -> None:
        """Send an event to the driver, from rank 0 alone, without waiting."""
        if self.rank == 0:
            self.poll_stop_request()  # the answer to the last is not lost
            self._sent = self.mailbox.put.remote(self.topic, event)

    def flush(self) -> None:
        """Wait until the last event has arrived."""
        if self._sent is not None:
            ray.get(self._sent)

    def all_reduce_sum(self, tensor: Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def _advice(self) -> str:
        return f"training diverged; try a lower --lr than {self.config.lr:g}"

    def _to_device(self, array: Any) -> Tensor:
        return as_tensor(array).to(self.device, non_blocking=True)
