"""A net over several workers, under a layout of alexnet/partition.py: the only file here that knows of process groups.

A layout changes speed and memory, never the result. The net stays single-device code: here its layers are cut to a
worker's part, and exchanges are inserted before layers that read more than that.

N images, C maps or units, P workers of a group.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .dropout import BatchPosition
from .linear import linear
from .lrn import LocalResponseNorm
from .net import AlexNet
from .partition import KINDS, Layout, Partition

__all__ = ["KINDS", "Layout", "Partition", "ShardedNet"]


class ShardedNet(nn.Module):
    """A worker's part of a net under a layout, with the exchanges that connect the parts.

    The parameters are those of `part`. Training takes the loss summed over the images that `forward` scores and
    divided by the size of the global batch: each worker then holds the gradient of the mean loss.
    """

    def __init__(self, net: AlexNet, layout: Layout, rank: int = 0) -> None:
        """Take this rank's part of a whole net, on its device. With more than one worker, torch.distributed must be
        initialised, and all workers create their ShardedNet together, from equal nets."""
        super().__init__()
        self.partition = Partition(net.preset, layout)
        self.partition.check(net)
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

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes within add to this worker's own gradients; the first one after it exchanges their sum."""
        with ExitStack() as stack:
            for trained in self._trained:
                if isinstance(trained, DistributedDataParallel):
                    stack.enter_context(trained.no_sync())
            yield

    def whole_sums(self, params: Sequence[Tensor], sums: Tensor) -> Tensor:
        """From sums over what this worker holds of parameters, (parameters, S), those over the whole parameters. Parts
        are added up over the group, what each of its workers holds whole is counted once; LARS takes norms so."""
        if self.layout.group_size == 1:
            return sums
        names: dict[Tensor, str] = {param: name for name, param in self.part.named_parameters()}
        sharded = torch.tensor([[self.partition.is_sharded(names[param])] for param in params], device=sums.device)
        total = sums.clone()
        dist.all_reduce(total, group=self.group)
        return torch.where(sharded, total, sums)

    @property
    def is_group_leader(self) -> bool:
        """Whether this worker is the one of its group whose losses and errors are counted."""
        return self.group_rank == 0

    def local_slice(self, name: str, length: int) -> tuple[slice, ...]:
        """The index of this worker's part of a canonical parameter, whose size along `shard_dim` is `length`."""
        if not self.partition.is_sharded(name):
            return (slice(None),)
        share = length // self.layout.group_size
        return (slice(None),) * self.partition.shard_dim(name) + (
            slice(self.group_rank * share, (self.group_rank + 1) * share),
        )

    def canonical_shape(self, name: str, part: Tensor) -> list[int]:
        """The shape of the whole parameter of which this worker holds `part`."""
        shape = list(part.shape)
        if self.partition.is_sharded(name):
            shape[self.partition.shard_dim(name)] *= self.layout.group_size
        return shape

    def gather_full(self, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
        """Whole tensors, one at a time, from the parts that the group's workers hold under the parameters' names: on
        the CPU of the group's first worker, None on the others. All of them must exhaust the iterator."""
        for name, part in parts.items():
            if not self.partition.is_sharded(name):
                yield name, part.cpu() if self.is_group_leader else None
                continue
            ranks, own = self.layout.group_of(self.rank), part.contiguous()
            pieces = [torch.empty_like(own) for _ in ranks] if self.is_group_leader else None
            dist.gather(own, pieces, dst=ranks[0], group=self.group)
            yield name, torch.cat(pieces, self.partition.shard_dim(name)).cpu() if pieces else None

    def _keep_own_part(self) -> None:
        """Reduce the net's layers to this worker's part, and insert the exchanges between them."""
        net, size, head = self.part, self.layout.group_size, self.part.preset.head.name
        with torch.no_grad():
            for name, param in list(net.named_parameters()):
                if self.partition.is_sharded(name):
                    layer, kind = name.split(".")
                    own = param[self.local_slice(name, param.shape[self.partition.shard_dim(name)])].clone()
                    setattr(getattr(net, layer), kind, nn.Parameter(own, requires_grad=param.requires_grad))
        for name in self.partition.sharded:
            layer = getattr(net, name)
            if isinstance(layer, nn.Conv2d):
                layer.out_channels //= size
                if layer.groups > 1:
                    layer.in_channels, layer.groups = layer.in_channels // size, layer.groups // size
            elif name != head:
                layer.out_features //= size
        self._first_units()
        if self.layout.kind == "columns":
            for norm in net.children():
                if isinstance(norm, LocalResponseNorm):
                    norm.columns //= size
        for name in self.partition.gathers_maps:
            getattr(net, name).register_forward_pre_hook(self._gather_input)
        setattr(net, head, _SummedLinear(getattr(net, head), self.group))

    def _first_units(self) -> None:
        """Tell each dropout which of its layer's units this worker holds."""
        net, size = self.part, self.layout.group_size
        units = net.num_features // size if self.layout.kind == "columns" else None  # held before the layer; None: all
        for layer in net.preset.fully_connected:
            if layer.dropout == "of input" and units is not None:
                net.dropout_of(layer).first_unit = self.group_rank * units
            units = getattr(net, layer.name).out_features
            if layer.dropout == "of output":
                net.dropout_of(layer).first_unit = self.group_rank * units

    def _gather_input(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (gather_maps(inputs[0], self.group),)


class _SummedLinear(nn.Linear):
    """The last layer: each worker multiplies the units before it that it holds, and the products are summed.

    An image costs num_classes numbers to sum forward and none backward. Splitting the outputs instead would mean
    gathering the 4096 units forward and summing their gradients backward: eight times as much for 1000 classes.
    """

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__(1, whole.out_features, device="meta")
        self.in_features, self.weight, self.bias = whole.weight.shape[1], whole.weight, whole.bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        partial = linear(x, self.weight)
        if partial.dtype == torch.bfloat16:
            partial = partial.float()
        return sum_partial(partial, self.group) + self.bias


class _Features(nn.Module):
    """The convolutions of a net as a module of their own: what hybrid trains in data parallel."""

    def __init__(self, net: AlexNet) -> None:
        super().__init__()
        self.layers = nn.ModuleList(getattr(net, conv.name) for conv in net.preset.convs)
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
