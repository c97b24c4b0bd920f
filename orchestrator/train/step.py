"""One worker's part of a step, in plain PyTorch: a batch through the net, its loss, the update.

N images, C maps, H rows, W columns of pixels.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import alexnet
from alexnet import Warmup, WeightAverage, augment
from alexnet.dropout import BatchPosition
from alexnet.layouts import ShardedNet
from orchestrator.config.train import TrainConfig
from orchestrator.data.order import batch_parts, rank_slice, rows_of_pass
from orchestrator.data.reader import Batch
from orchestrator.train.device_batches import DeviceBatch, copied_ahead, to_device
from orchestrator.train.profile import Spans, no_span

Part = list[tuple[int, int]]  # of a global batch: where each worker's images begin and end in the pass
Pending = tuple[Tensor, int, float]  # a step's loss sum, number of images and stop code, not yet summed over workers


class WorkerStep:
    """A worker's net and optimizer, and what it does with its part of a global batch."""

    def __init__(
        self,
        net: ShardedNet,
        optimizer: torch.optim.Optimizer,
        mean_HWC: Tensor,
        config: TrainConfig,
        rows: Mapping[str, int],
        *,
        bf16: bool,
        class_weights: Tensor | None = None,
        warmup: Warmup | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        """mean_HWC: the mean image, on the net's device. rows: images of each split. class_weights: of the training
        loss, (num_classes,), on the net's device in its type. warmup: of the rate. average: takes in every update."""
        self.net, self.optimizer, self.config, self.rows, self.bf16 = net, optimizer, config, rows, bf16
        self.class_weights, self.warmup, self.average = class_weights, warmup or Warmup(), average
        self.span: Spans = no_span
        weight = next(net.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.subtract_mean = alexnet.MeanSubtraction(mean_HWC, config.crop_size, config.pixel_scale)
        noisy = config.color_noise == "code2012"
        self.divisors = {"train": augment.CODE2012_SHRINK if noisy else 1.0}  # of other passes 1

    def on_device(self, batches: Iterable[Batch]) -> Iterator[DeviceBatch]:
        """A pass's batches, each on the net's device before its step."""
        return copied_ahead(batches, self.device, self.span)

    def update(self, batch: Batch | DeviceBatch, step: int, total_step: int) -> tuple[Tensor, int]:
        """One update on the global batch's mean loss; total_step: updates made before this one.

        With class_weights the loss of each image is multiplied by its class's weight. The sum is divided by the number
        of images all the same, and not by the sum of their weights, which is another in every batch: every image then
        counts alike in every batch, and no layout has anything to exchange for it.

        With `accumulate` the batch is computed in parts, whose gradients are summed, and exchanged with the last. What
        dropout zeroes of an image does not depend on its part.

        Returns the loss summed over the images of this worker's group, a float64 scalar on the device, and their
        number; zeros from all workers of a group but its leader, so that the sums over all workers are right.
        """
        total, images = torch.zeros((), dtype=torch.float64, device=self.device), 0
        batch = self._placed(batch)
        parts = self.parts("train", step)
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else self.net.accumulating():
                scores, labels = self.scores("train", step, batch, total_step, part)
                with self.span("backward"):
                    loss_sum = F.cross_entropy(scores, labels, self.class_weights, reduction="sum")
                    torch.autograd.backward(loss_sum / self.size_of("train", step))
            total, images = total + loss_sum.detach().double(), images + len(labels)
        with self.span("update"):
            with self.warmup.applied(self.optimizer, total_step):
                self.optimizer.step()
            self.net.zero_grad()
            if self.average is not None:
                self.average.update(total_step + 1)
        return total * self.net.is_group_leader, images * self.net.is_group_leader

    @torch.no_grad()
    def evaluate(self, batch: Batch | DeviceBatch, step: int, split: str = "val") -> Tensor:
        """(4 + num_classes,) on the device, of a batch of val or probe: loss sum, without class_weights, wrong at
        top 1, wrong at top 5, images, and of each class those wrong at top 1; zeros but from a group's leader."""
        batch = self._placed(batch)
        found = [self.scores(split, step, batch, 0, part) for part in self.parts(split, step)]
        scores, labels = (torch.cat(each) for each in zip(*found, strict=True))
        if not self.net.is_group_leader:
            return torch.zeros(4 + scores.shape[1], dtype=torch.float64, device=self.device)
        loss_sum = F.cross_entropy(scores, labels, reduction="sum")
        images = torch.tensor([len(labels)], device=self.device)
        wrong = alexnet.count_errors(scores, labels), images, alexnet.errors_by_class(scores, labels)
        return torch.cat([loss_sum[None], *wrong])

    def parts(self, split: str, step: int) -> list[Part]:
        """The parts of a global batch, the same on all workers."""
        config = self.config
        return batch_parts(
            step, rows_of_pass(split, self.rows), config.global_batch_size, self.net.layout.workers, config.accumulate
        )

    def scores(
        self, split: str, step: int, batch: Batch | DeviceBatch, total_step: int, part: Part | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class scores and labels of a part's images of this worker's group: the images of each of its workers, in the
        order of the global batch. Of all images if no part is given.

        batch: this worker's images of the step: uint8 `image` (N, H, W, 3) and the columns of device_batches.CUT; with
        a `shift` the images are whole, and are cut here.
        """
        config, layout, num_rows = self.config, self.net.layout, rows_of_pass(split, self.rows)
        if part is None:
            [part] = batch_parts(step, num_rows, config.global_batch_size, layout.workers, 1)
        slices = [part[rank] for rank in layout.group_of(self.net.rank)]
        first, _ = rank_slice(step, num_rows, config.global_batch_size, self.net.rank, layout.workers)
        lo, hi = part[self.net.rank]
        image, cut, shift = self._placed(batch).part(lo - first, hi - first)
        sizes = [hi - lo for lo, hi in slices]
        with self.span("exchange"):
            top, left, flip = self.net.share_images(cut[:, :3], sizes).unbind(1)
            labels = self.net.share_labels(cut[:, 3:], sizes).long().flatten()
        begin = step * config.global_batch_size
        position = torch.cat([torch.arange(lo - begin, hi - begin, device=self.device) for lo, hi in slices])
        where = BatchPosition(config.seed, total_step, position)
        with self.span("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            images = self.net.share_images(image, sizes)
            if shift is not None:
                shifts = self.net.share_images(shift, sizes)
                images = augment.crop_flip_shift_tensors(images, top, left, flip.bool(), shifts, config.crop_size)
            x = self.subtract_mean(images, top, left, flip.bool(), divisor=self.divisors.get(split, 1.0))
            scores = self.net(x.to(self.dtype), where, sizes)
        return scores.to(self.dtype), labels

    def size_of(self, split: str, step: int) -> int:
        """Images of a global batch; the last of a pass may be smaller."""
        return min(self.config.global_batch_size, rows_of_pass(split, self.rows) - step * self.config.global_batch_size)

    def all_reduce(self, pending: Sequence[Pending]) -> list[tuple[float, float, float]]:
        """Loss sum, number of images and stop code of each pending step, summed over all workers."""
        host = torch.tensor([counted for _, *counted in pending], dtype=torch.float64)
        sums = torch.cat([torch.stack([loss for loss, *_ in pending])[:, None], host.to(self.device)], dim=1)
        all_reduce_sum(sums, self.net.layout.workers)
        return [(loss, count, stop) for loss, count, stop in sums.tolist()]

    def all_reduce_total(self, total: Tensor) -> list[float]:
        """The sums of `evaluate` over all workers."""
        all_reduce_sum(total, self.net.layout.workers)
        found: list[float] = total.tolist()
        return found

    def _placed(self, batch: Batch | DeviceBatch) -> DeviceBatch:
        if isinstance(batch, DeviceBatch):
            return batch
        with self.span("copy"):
            return to_device(batch, self.device)


def all_reduce_sum(tensor: Tensor, world_size: int) -> None:
    """Replace the tensor by its sum over all workers, in place."""
    if world_size > 1:
        dist.all_reduce(tensor)
