"""How the net is partitioned over workers: the only file here that knows of process groups.

    single    one worker holds the net
    data      every worker holds the net and trains on its own images; gradients are summed
    columns   two workers hold a column each, half of every layer's maps, and train on the same images (paper, 3.5)
    hybrid    every worker holds the convolutions for its own images, and its share of the fully connected layers'
              units for all images (Krizhevsky 2014, arXiv 1404.5997)

A layout changes speed and memory, never the result. The workers that together hold one net are a group of consecutive
ranks; several groups train in data parallel. The net stays single-device code: here its layers are cut to a worker's
part, and exchanges are inserted before layers that read more than that.

N images, C maps or units, P workers of a group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .dropout import BatchPosition
from .net import AlexNet

KINDS = ("single", "data", "columns", "hybrid")
CONVS = ("conv1", "conv2", "conv3", "conv4", "conv5")
FULLY_CONNECTED = ("fc6", "fc7", "fc8")


@dataclass(frozen=True)
class Layout:
    """A kind of partition for a number of workers. Raises ValueError where they do not match."""

    kind: str
    workers: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layout = {self.kind!r}: unknown; choose one of {', '.join(KINDS)}")
        if self.kind == "single" and self.workers != 1:
            raise ValueError(f"workers = {self.workers}: layout single has one; choose data, columns or hybrid")
        if self.workers < 1 or self.workers % self.group_size:
            raise ValueError(
                f"workers = {self.workers}: layout {self.kind} needs a multiple of {self.group_size}, one worker "
                "per column; or choose another layout, such as data"
            )

    @property
    def group_size(self) -> int:
        """Workers that together hold one net."""
        return {"columns": AlexNet.columns, "hybrid": self.workers}.get(self.kind, 1)

    @property
    def replicas(self) -> int:
        """Copies of the net."""
        return self.workers // self.group_size

    def group_of(self, rank: int) -> range:
        """The ranks that together hold a net with this one."""
        first = rank - rank % self.group_size
        return range(first, first + self.group_size)

    def is_sharded(self, name: str) -> bool:
        """Whether a worker holds only a part of this layer or parameter."""
        layer = name.split(".")[0]
        return self.group_size > 1 and (self.kind == "columns" or layer in FULLY_CONNECTED) and name != "fc8.bias"

    def shard_dim(self, name: str) -> int:
        """The dimension along which a sharded parameter is split: inputs for fc8, outputs for all others."""
        return 1 if name == "fc8.weight" else 0

    def check(self, net: AlexNet) -> None:
        """Raises ValueError where a layer of the net cannot be split equally."""
        for name, param in net.named_parameters():
            if self.is_sharded(name) and param.shape[self.shard_dim(name)] % self.group_size:
                raise ValueError(
                    f"workers = {self.workers}: {name.split('.')[0]} has {param.shape[self.shard_dim(name)]} units, "
                    f"which {self.group_size} workers of layout {self.kind} cannot share equally"
                )


class ShardedNet(nn.Module):
    """A worker's part of a net under a layout, with the exchanges that connect the parts.

    The parameters are those of `part`. Training takes the loss summed over the images that `forward` scores and
    divided by the size of the global batch: each worker then holds the gradient of the mean loss.
    """

    def __init__(self, net: AlexNet, layout: Layout, rank: int = 0) -> None:
        """Take this rank's part of a whole net, on its device. With more than one worker, torch.distributed must be
        initialised, and all workers create their ShardedNet together, from equal nets."""
        super().__init__()
        layout.check(net)
        self.layout, self.rank, self.part = layout, rank, net
        self.group_rank = rank % layout.group_size  # this worker's place in its group
        self._trained: list[nn.Module] = []  # in a list, so that it is not a child: it holds the part
        if layout.workers == 1:
            return
        device = next(net.parameters()).device
        mesh = init_device_mesh(device.type, (layout.replicas, layout.group_size), mesh_dim_names=("replica", "member"))
        self.group = mesh.get_group("member")
        if layout.group_size > 1:
            self._keep_own_part()
        if layout.kind == "hybrid":
            self._trained.append(_summing(_Features(net), mesh.get_group("member")))
        elif layout.replicas > 1:
            self._trained.append(_summing(net, mesh.get_group("replica")))

    def forward(self, x_NCHW: Tensor, where: BatchPosition | None, sizes: Sequence[int]) -> Tensor:
        """Class scores of the group's images, (sum of sizes, num_classes), the same on all its workers.

        x_NCHW: this worker's images, or those that `share_images` made of them; where: of all the group's images;
        sizes: how many of them each worker of the group has.
        """
        if self.layout.kind == "hybrid" and self._trained:
            return self.part.classify(gather_rows(self._trained[0](x_NCHW), sizes, self.group), where)
        scores: Tensor = (self._trained[0] if self._trained else self.part)(x_NCHW, where)
        return scores

    def share_images(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """From the rows that each worker of the group has, those of all images that this worker's convolutions see."""
        return gather_rows(rows, sizes, self.group) if self.layout.kind == "columns" else rows

    def share_labels(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """From the rows that each worker of the group has, those of all images that `forward` scores."""
        return gather_rows(rows, sizes, self.group) if self.layout.group_size > 1 else rows

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients, or free them. Those in DDP's buckets cannot be freed, and are zeroed either way."""
        in_buckets = {param for trained in self._trained for param in trained.parameters()}
        for param in self.part.parameters():
            if set_to_none and param not in in_buckets:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    @property
    def is_group_leader(self) -> bool:
        """Whether this worker is the one of its group whose losses and errors are counted."""
        return self.group_rank == 0

    def local_slice(self, name: str, length: int) -> tuple[slice, ...]:
        """The index of this worker's part of a canonical parameter, whose size along `shard_dim` is `length`."""
        if not self.layout.is_sharded(name):
            return (slice(None),)
        share = length // self.layout.group_size
        return (slice(None),) * self.layout.shard_dim(name) + (
            slice(self.group_rank * share, (self.group_rank + 1) * share),
        )

    def canonical_shape(self, name: str, part: Tensor) -> list[int]:
        """The shape of the whole parameter of which this worker holds `part`."""
        shape = list(part.shape)
        if self.layout.is_sharded(name):
            shape[self.layout.shard_dim(name)] *= self.layout.group_size
        return shape

    def gather_full(self, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
        """Whole tensors, one at a time, from the parts that the group's workers hold under the parameters' names: on
        the CPU of the group's first worker, None on the others. All of them must exhaust the iterator."""
        for name, part in parts.items():
            if not self.layout.is_sharded(name):
                yield name, part.cpu() if self.is_group_leader else None
                continue
            ranks, own = self.layout.group_of(self.rank), part.contiguous()
            pieces = [torch.empty_like(own) for _ in ranks] if self.is_group_leader else None
            dist.gather(own, pieces, dst=ranks[0], group=self.group)
            yield name, torch.cat(pieces, self.layout.shard_dim(name)).cpu() if pieces else None

    def _keep_own_part(self) -> None:
        """Reduce the net's layers to this worker's part, and insert the exchanges between them."""
        net, size = self.part, self.layout.group_size
        names = FULLY_CONNECTED if self.layout.kind == "hybrid" else CONVS + FULLY_CONNECTED
        with torch.no_grad():
            for name, param in list(net.named_parameters()):
                if self.layout.is_sharded(name):
                    layer, kind = name.split(".")
                    own = param[self.local_slice(name, param.shape[self.layout.shard_dim(name)])].clone()
                    setattr(getattr(net, layer), kind, nn.Parameter(own, requires_grad=param.requires_grad))
        for name in names:
            layer = getattr(net, name)
            if isinstance(layer, nn.Conv2d):
                layer.out_channels //= size
                if layer.groups > 1:
                    layer.in_channels, layer.groups = layer.in_channels // size, layer.groups // size
            elif name != "fc8":
                layer.out_features //= size
        self._first_units()
        if self.layout.kind == "columns":
            net.relu_norm.columns //= size
            net.conv3.register_forward_pre_hook(self._gather_input)
            net.fc6.register_forward_pre_hook(self._gather_input)
        net.fc7.register_forward_pre_hook(self._gather_input)
        net.fc8 = _SummedLinear(net.fc8, self.group)

    def _first_units(self) -> None:
        net = self.part
        net.dropout6.first_unit = self.group_rank * net.fc6.out_features
        net.dropout7.first_unit = self.group_rank * net.fc7.out_features

    def _gather_input(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (gather_maps(inputs[0], self.group),)


class _SummedLinear(nn.Linear):
    """fc8: each worker multiplies the units of fc7 that it holds, and the products are summed.

    An image costs num_classes numbers to sum forward and none backward. Splitting the outputs instead would mean
    gathering fc7's 4096 units forward and summing their gradients backward: eight times as much for 1000 classes.
    """

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__(1, whole.out_features, device="meta")
        self.in_features, self.weight, self.bias = whole.weight.shape[1], whole.weight, whole.bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        partial = F.linear(x, self.weight)
        if partial.dtype == torch.bfloat16:
            partial = partial.float()
        return sum_partial(partial, self.group) + self.bias


class _Features(nn.Module):
    """The convolutions of a net as a module of their own: what hybrid trains in data parallel."""

    def __init__(self, net: AlexNet) -> None:
        super().__init__()
        self.layers = nn.ModuleList(getattr(net, name) for name in CONVS)
        self._features = net.features

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self._features(x_NCHW)


def _summing(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """The module with its gradients summed over the group, in buckets, while the backward pass still runs; the module
    itself if none of its parameters has a gradient."""
    if not any(param.requires_grad for param in module.parameters()):
        return module
    device = next(module.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    parallel = DistributedDataParallel(module, device_ids=ids, process_group=group, gradient_as_bucket_view=True)
    parallel.register_comm_hook(group, _sum_bucket)
    return parallel


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Sum, where DDP would average: the loss is divided by the global batch already, and parts may differ in size."""
    work: Any = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    result: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return result


def gather_maps(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(N, C / P, ...) of every worker to (N, C, ...) on all, the first worker's maps first.

    Backward: each worker's layers read all maps, so a map's gradient is the sum of what all workers have for it.
    """
    result: Tensor = _GatherMaps.apply(x, group)
    return result


def gather_rows(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """(sizes[p], ...) of worker p to (sum of sizes, ...) on all, in the order of the workers; backward as above."""
    result: Tensor = _GatherRows.apply(x, list(sizes), group)
    return result


def sum_partial(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the workers, on all of them.

    Backward: nothing to exchange, since each worker's loss is the same function of the sum.
    """
    result: Tensor = _SumPartial.apply(x, group)
    return result


class _GatherMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        own = x.movedim(1, -1).contiguous()  # maps last: a free view of channels_last memory
        workers = dist.get_world_size(group)
        parts = own.new_empty(workers * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(parts, own, group=group)
        parts = parts.view(workers, *own.shape)
        return parts.movedim(0, -2).flatten(-2).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        workers = dist.get_world_size(ctx.group)
        parts = grad.movedim(1, -1).unflatten(-1, (workers, -1)).movedim(-2, 0).contiguous()
        return _sum_of_received(parts, ctx.group).movedim(-1, 1), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, group):  # type: ignore[no-untyped-def]
        ctx.sizes, ctx.group = sizes, group
        longest = max(sizes)
        own = x.contiguous()
        if len(own) < longest:
            own = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
        rows = own.new_empty(len(sizes) * longest, *own.shape[1:])
        dist.all_gather_into_tensor(rows, own, group=group)
        if min(sizes) == longest:
            return rows
        return torch.cat([part[:size] for part, size in zip(rows.split(longest), sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        own = ctx.sizes[dist.get_rank(ctx.group)]
        received = grad.new_empty(len(ctx.sizes) * own, *grad.shape[1:])
        dist.all_to_all_single(received, grad.contiguous(), [own] * len(ctx.sizes), ctx.sizes, group=ctx.group)
        return received.view(len(ctx.sizes), own, *grad.shape[1:]).sum(0), None, None


class _SumPartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


def _sum_of_received(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """parts[p] goes to worker p; the sum of what arrives, always in the order of the workers.

    A reduce-scatter in its bytes; the sum is made here because its order, and with it every bit, is then the same in
    every run, and because bfloat16 is added up in float32.
    """
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.sum(0)
