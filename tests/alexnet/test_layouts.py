"""Every layout is the same net: against one process, through every exchange, and with each exchange broken."""

import functools
import sys
import time

import pytest
import torch
import torch.distributed as dist
from gloo import bytes_sent, run_gloo
from torch.nn import functional as F

import alexnet
from alexnet import layouts
from alexnet.cost import Exchange, communication
from alexnet.dropout import BatchPosition, keep_mask
from alexnet.layouts import Layout, Partition, ShardedNet
from alexnet.net import AlexNet
from alexnet.presets import PRESETS
from alexnet.presets.description import LRN, Conv, FullyConnected, Gaussian, Pool, Preset
from orchestrator.data.order import rank_slice

CLASSES = 7  # divisible neither by columns nor by workers
BATCH, STEPS = 12, 20
KINDS = ("data", "columns", "hybrid")
# nothing here may know the names or the number of the paper's layers, or what comes after which
ODD = Preset(
    name="odd",
    title="two columns, other names, LRN before ReLU, averages, dropout of inputs",
    source="",
    differences=(),
    input_size=64,
    columns=2,
    lrn=LRN(alpha=0.1),
    convs=(
        Conv("eye", 4, 7, Gaussian(0.1), stride=3, padding=1, then=("lrn", Pool("max", 2, 2), "relu")),
        Conv("ear", 6, 3, Gaussian(0.1, 0.1), then=("relu", Pool("average", 3, 2, ceil=True))),
        Conv("nose", 8, 3, Gaussian(0.1), reads="own column", then=("relu",)),
    ),
    fully_connected=(
        FullyConnected("thought", 16, Gaussian(0.1), dropout="of input"),
        FullyConnected("word", None, Gaussian(0.1), activation=None, dropout="of input"),
    ),
)
OTHERS = {"caffe": ("data", "hybrid"), "torchvision": ("data", "hybrid"), "odd": KINDS}  # presets and their layouts


def build(dtype, dropout, preset="paper"):
    if preset == "odd":
        net = AlexNet(ODD, CLASSES, dropout=dropout)
        net.initialize("paper", 3)
        return net.to(dtype)
    net = alexnet.build(preset, CLASSES, input_size=64, width=0.125, init="he", dropout=dropout, seed=3)
    return net.to(dtype)


def global_batch(step, dtype):
    """The images and labels of a step; every fourth batch is a short last one, and one has a single image."""
    random = torch.Generator().manual_seed(step)
    size = 5 if step % 4 == 3 else 1 if step == 6 else BATCH  # of one image most workers have no part
    images = torch.randn(size, 3, 64, 64, generator=random, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, CLASSES, (size,), generator=random)


def make(rank, kind, workers, dtype, dropout, preset="paper"):
    sharded = ShardedNet(build(dtype, dropout, preset), Layout(kind, workers), rank)
    return sharded, alexnet.PaperSGD(sharded.parameters(), lr=0.001)


def backward(sharded, step, dtype):
    """A step's forward and backward pass, as the worker does it; returns the global batch's mean loss."""
    images, labels = global_batch(step, dtype)
    size, workers = len(labels), sharded.layout.workers
    slices = [rank_slice(0, size, size, rank, workers) for rank in sharded.layout.group_of(sharded.rank)]
    lo, hi = slices[sharded.group_rank]
    sizes = [last - first for first, last in slices]
    own_labels = sharded.share_labels(labels[lo:hi], sizes)
    where = BatchPosition(11, step, torch.arange(slices[0][0], slices[-1][1]))
    sharded.train()
    scores = sharded(sharded.share_images(images[lo:hi], sizes), where, sizes)
    loss = F.cross_entropy(scores, own_labels, reduction="sum") / size
    loss.backward()
    total = loss.detach() * sharded.is_group_leader
    if workers > 1:
        dist.all_reduce(total)
    return total


def scores_of(sharded, step, dtype):
    """Every image's scores in evaluation, on rank 0 in the order of the global batch."""
    images, _ = global_batch(step, dtype)
    size, workers = len(images), sharded.layout.workers
    slices = [rank_slice(0, size, size, rank, workers) for rank in sharded.layout.group_of(sharded.rank)]
    lo, hi = slices[sharded.group_rank]
    sizes = [last - first for first, last in slices]
    sharded.eval()
    with torch.no_grad():
        scores = sharded(sharded.share_images(images[lo:hi], sizes), None, sizes)
    everyone = [scores]
    if workers > 1:
        everyone = [None] * workers
        dist.all_gather_object(everyone, scores if sharded.is_group_leader else None)
    return torch.cat([part for part in everyone if part is not None])


def train(rank, kind, workers, dtype, dropout, steps=STEPS, preset="paper"):
    """A run of some steps; canonical tensors of what came of it, on rank 0."""
    sharded, optimizer = make(rank, kind, workers, dtype, dropout, preset)
    found = {"scores before": scores_of(sharded, 0, dtype)}
    losses = []
    for step in range(steps):
        losses.append(backward(sharded, step, dtype))
        if step in (0, 3):
            gradients = {name: p.grad for name, p in sharded.part.named_parameters()}
            found |= collected(sharded, gradients, f"gradient {step}")
        optimizer.step()
        sharded.zero_grad()
    found |= {"losses": torch.stack(losses), "scores": scores_of(sharded, 3, dtype)}
    return found | collected(sharded, dict(sharded.part.named_parameters()), "weight")


def collected(sharded, parts, what):
    return {f"{what} {name}": whole.detach().clone() for name, whole in sharded.gather_full(parts) if whole is not None}


@functools.cache
def alone(dtype, dropout, steps=STEPS, preset="paper"):
    torch.set_num_threads(1)
    return train(0, "single", 1, dtype, dropout, steps, preset)


VARIANTS = [(torch.float64, 0.5), (torch.float64, 0.0), (torch.float32, 0.5), (torch.float32, 0.0)]


def everything(rank, workers):
    """All that the tests below look at: to start processes takes longer than what they do."""
    return {
        "trained": {
            (kind, str(dtype), dropout): train(rank, kind, workers, dtype, dropout)
            for kind in KINDS
            for dtype, dropout in VARIANTS
        },
        "gradients": check_gradients(rank),
        "bytes": {
            (preset, kind): count_bytes(rank, kind, workers, preset)
            for preset, kinds in ({"paper": KINDS} | OTHERS).items()
            if preset in PRESETS
            for kind in kinds
        },
        "others": {
            (preset, kind): train(rank, kind, workers, torch.float64, 0.5, 5, preset)
            for preset, kinds in OTHERS.items()
            for kind in kinds
        },
    }


@pytest.fixture(scope="module", params=[2, 4])
def together(request):
    """What 2 and 4 processes found, each."""
    return request.param, run_gloo(request.param, everything, request.param)


def difference(a, b):
    """Largest difference of two tensors relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


@pytest.mark.slow
def test_every_layout_equals_one_process(together):
    workers, found = together
    for (kind, dtype, dropout), trained in found[0]["trained"].items():
        wanted = alone(getattr(torch, dtype.removeprefix("torch.")), dropout)
        assert trained.keys() == wanted.keys()
        bound = 1e-10 if dtype == "torch.float64" else 1e-5
        for name, tensor in trained.items():
            assert tensor.shape == wanted[name].shape
            assert difference(tensor, wanted[name]) < bound, f"{kind} {workers} {dtype} dropout {dropout}: {name}"


@pytest.mark.slow
def test_every_layout_of_every_preset_equals_one_process(together):
    workers, found = together
    assert set(PRESETS) < {"paper", *OTHERS}
    for (preset, kind), trained in found[0]["others"].items():
        wanted = alone(torch.float64, 0.5, 5, preset)
        assert trained.keys() == wanted.keys()
        for name, tensor in trained.items():
            assert tensor.shape == wanted[name].shape
            assert difference(tensor, wanted[name]) < 1e-10, f"{preset} {kind} {workers}: {name}"


def test_what_is_exchanged_follows_from_the_description():
    def exchanged(preset, kind, workers):
        partition = Partition(preset, Layout(kind, workers))
        return partition.sharded, partition.gathers_rows, partition.gathers_maps

    assert exchanged(ODD, "columns", 2) == (("eye", "ear", "nose", "thought", "word"), None, ("ear", "thought"))
    assert exchanged(ODD, "hybrid", 3) == (("thought", "word"), "thought", ())
    assert exchanged(PRESETS["torchvision"], "hybrid", 2) == (("fc6", "fc7", "fc8"), "fc6", ("fc7",))
    assert exchanged(ODD, "data", 2) == exchanged(ODD, "hybrid", 1) == ((), None, ())


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("torchvision", "layout = columns: preset torchvision has one column; choose data, hybrid or single"),
        ("caffe", "layout = columns: preset caffe has LRN across its columns; choose data, hybrid or single"),
    ],
)
def test_columns_of_a_net_that_cannot_have_them_are_refused(preset, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        ShardedNet(build(torch.float32, 0.5, preset), Layout("columns", 2))


def _keep_own(parts, group):
    return parts[dist.get_rank(group)].clone()


def _swapped(x, group):
    return layouts._GatherMaps.apply(x, group).roll(x.shape[1], 1)


def _reversed(x, sizes, group):
    return layouts._GatherRows.apply(x, sizes, group).flip(0)


# what is broken: (layout, the name in alexnet/layouts.py, what takes its place)
MUTATIONS = {
    "the backward sum of gathered maps is dropped": ("columns", "_sum_of_received", _keep_own),
    "the columns are swapped": ("columns", "gather_maps", _swapped),
    "the maps are not gathered but repeated": ("columns", "gather_maps", lambda x, group: torch.cat([x, x], 1)),
    "the products of fc8 are not summed": ("columns", "sum_partial", lambda x, group: x * 1),
    "the scores are summed backward too": ("columns", "sum_partial", lambda x, group: _SumTwice.apply(x, group)),
    "every worker drops the first units": ("columns", "ShardedNet._first_units", lambda self: None),
    "hybrid's images change places": ("hybrid", "gather_rows", _reversed),
    "features get no gradient from others": ("hybrid", "gather_rows", lambda *given: _NoSum.apply(*given)),
    "the backward sum of gathered units is dropped": ("hybrid", "_sum_of_received", _keep_own),
    "gradients are not summed over replicas": ("data", "_sum_bucket", lambda group, bucket: _done(bucket.buffer())),
    "the mean is taken twice": ("data", "_sum_bucket", lambda group, bucket: _halved(group, bucket)),
}


class _SumTwice(layouts._SumPartial):
    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total, None


class _NoSum(layouts._GatherRows):
    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes)[dist.get_rank(ctx.group)].clone(), None, None


def _done(tensor):
    future = torch.futures.Future()
    future.set_result(tensor)
    return future


def _halved(group, bucket):
    total = bucket.buffer()
    dist.all_reduce(total, group=group)
    return _done(total / 2)


def train_broken(rank):
    """The largest difference from one process that each mutation makes in three steps, and that none makes."""
    found = {}
    wanted = alone(torch.float64, 0.5, 3)
    for name, (kind, target, broken) in ({"nothing": ("columns", "KINDS", None)} | MUTATIONS).items():
        place = layouts
        *path, target = target.split(".")
        for part in path:
            place = getattr(place, part)
        with pytest.MonkeyPatch.context() as patch:
            if broken is not None:
                patch.setattr(place, target, broken)
            result = train(rank, kind, 2, torch.float64, 0.5, 3)
        if rank == 0:
            found[name] = max(difference(result[key], wanted[key]) for key in wanted)
    return found


@pytest.mark.slow
def test_every_broken_exchange_is_caught():
    found = run_gloo(2, train_broken)[0]
    assert found.pop("nothing") < 1e-10
    assert found.keys() == MUTATIONS.keys()
    assert min(found.values()) > 1e-3, found


class _SameOnAll(torch.autograd.Function):
    """The same leaf on every worker: its gradient is the sum of what the workers have for it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total


def check_gradients(rank):
    """gradcheck of every exchange as a function of all workers' inputs, which every worker perturbs alike."""
    group, size = dist.group.WORLD, dist.get_world_size()
    random = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    def weighed(result, key):  # other weights on every worker, then the sum over the workers
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(100 * key + rank)).double()
        return layouts.sum_partial(result * weights, group)

    sizes = [3, 1, 0, 2][:size]
    cases = {
        "maps of images": (
            lambda x: weighed(layouts.gather_maps(_SameOnAll.apply(x)[rank], group), 1),
            leaf(size, 2, 3, 2, 2),
        ),
        "units": (lambda x: weighed(layouts.gather_maps(_SameOnAll.apply(x)[rank], group), 2), leaf(size, 2, 3)),
        "rows": (
            lambda x: weighed(layouts.gather_rows(_SameOnAll.apply(x).split(sizes)[rank], sizes, group), 3),
            leaf(sum(sizes), 3),
        ),
        # every worker's loss is the same function of the sum: nothing to weigh
        "scores": (lambda x: layouts.sum_partial(_SameOnAll.apply(x)[rank], group), leaf(size, 3, 2)),
    }
    return {name: torch.autograd.gradcheck(function, (x,)) for name, (function, x) in cases.items()}


@pytest.mark.slow
def test_gradients_through_every_exchange(together):
    for found in together[1]:
        assert found["gradients"] == {"maps of images": True, "units": True, "rows": True, "scores": True}


def count_bytes(rank, kind, workers, preset):
    """Bytes that this worker's sockets send in one step of a layout, and the ledger's figure."""
    settings, size = {"input_size": 96, "width": 0.25}, 64
    layout = Layout(kind, workers)
    sharded = ShardedNet(alexnet.build(preset, 10, init="he", **settings), layout, rank)
    images = size // workers
    sizes = [images] * layout.group_size
    pixels, info = torch.zeros(images, 96, 96, 3, dtype=torch.uint8), torch.zeros(images, 4, dtype=torch.int32)
    for _ in range(2):  # the first step also sets up DDP's buckets
        dist.barrier()
        before = bytes_sent()
        labels = sharded.share_labels(info, sizes)[:, 0].long()
        x = sharded.share_images(pixels, sizes).permute(0, 3, 1, 2).float()
        F.cross_entropy(sharded(x, None, sizes), labels, reduction="sum").backward()
        time.sleep(0.3)  # for the last acknowledgements
        sent = bytes_sent() - before
    said = communication(layout, num_classes=10, global_batch_size=size, preset=preset, **settings)
    return torch.tensor([sent, sum(exchange.size_bytes for exchange in said)])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes with Linux's TCP_INFO")
def test_the_ledger_says_what_the_sockets_send(together):
    for found in together[1]:
        for key, both in found["bytes"].items():
            sent, said = both.tolist()
            assert sent == pytest.approx(said, rel=0.01), key


def test_the_ledger_of_the_paper_s_net():
    """By hand: 128 images of 224 pixels, 1,000 classes, float32."""
    settings = {"num_classes": 1000, "input_size": 224, "width": 1.0, "global_batch_size": 128}
    columns = {e.name: (e.forward_bytes, e.backward_bytes) for e in communication(Layout("columns", 2), **settings)}
    assert columns == {
        "images": (64 * (224 * 224 * 3 + 16), 0),
        "input of conv3": (128 * 128 * 13 * 13 * 4,) * 2,
        "input of fc6": (128 * 4608 * 4,) * 2,
        "input of fc7": (128 * 2048 * 4,) * 2,
        "scores of fc8": (128 * 1000 * 4, 0),
    }
    hybrid = {e.name: (e.forward_bytes, e.backward_bytes) for e in communication(Layout("hybrid", 4), **settings)}
    convolutions = 60_965_224 - (9217 * 4096 + 4097 * 4096 + 4097 * 1000)
    assert hybrid == {
        "input of fc6": (3 * 32 * 9216 * 4,) * 2,
        "input of fc7": (3 * 128 * 1024 * 4,) * 2,
        "scores of fc8": (1.5 * 128 * 1000 * 4, 0),
        "gradients": (0, 1.5 * convolutions * 4),
    }
    data = communication(Layout("data", 2), **settings)
    assert [(e.name, e.size_bytes) for e in data] == [("gradients", 60_965_224 * 4)]
    assert communication(Layout("single", 1), **settings) == []
    pairs = communication(Layout("columns", 4), **settings)  # two replicas: half the images each, gradients between
    assert pairs[0].size_bytes == columns["images"][0] / 2
    # each column has half of every layer, but all of fc8's biases
    assert pairs[-1] == Exchange("gradients", 0, (60_965_224 + 1000) // 2 * 4, overlaps=True)


def test_a_mask_belongs_to_the_image_and_not_to_who_draws_it():
    where = BatchPosition(1, 2, torch.arange(12))
    whole = keep_mask(where, 6, range(100), 0.5)
    for units in (range(0, 50), range(50, 100), range(33, 67), range(99, 100)):
        assert torch.equal(keep_mask(where, 6, units, 0.5), whole[:, units.start : units.stop])
    assert torch.equal(keep_mask(where._replace(position=torch.tensor([7, 3])), 6, range(100), 0.5), whole[[7, 3]])


def test_masks_are_fair_and_differ_by_seed_step_image_and_layer():
    where = BatchPosition(1, 2, torch.arange(512))
    for p in (0.2, 0.5):
        mask = keep_mask(where, 6, range(4096), p).double()
        assert abs(mask.mean() - (1 - p)) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
        for sums in (mask.mean(0), mask.mean(1)):  # neither a unit nor an image is favoured
            assert ((sums - (1 - p)).abs() < 6 * (p * (1 - p) * len(sums) / mask.numel()) ** 0.5).all()
    mask = keep_mask(where, 6, range(4096), 0.5)
    others = [(where._replace(seed=3), 6), (where._replace(step=3), 6), (where, 7)]
    others += [(where._replace(position=where.position + 512), 6)]
    for other, layer in others:
        assert abs((keep_mask(other, layer, range(4096), 0.5) == mask).double().mean() - 0.5) < 0.01
    assert abs((mask[:, 1:] == mask[:, :-1]).double().mean() - 0.5) < 0.01


def test_a_mask_is_splitmix64_of_seed_step_layer_position_and_unit():
    """In Python's own integers: a run resumed by a later version must draw the same masks."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = 0
    for part in (11, 2**40 + 5, 6):  # seed, step, layer
        key = mix(((key ^ part if part != 6 else key + part) + golden) % 2**64)
    mask = keep_mask(BatchPosition(11, 2**40 + 5, torch.tensor([0, 77])), 6, range(9), 0.2)
    for row, position in enumerate((0, 77)):
        rows = mix((position + key) % 2**64)
        for unit in range(9):
            word = mix((rows + (unit // 2 + 1) * golden) % 2**64)
            half = word >> 32 if unit % 2 else word % 2**32
            signed = half - 2**32 if half >= 2**31 else half
            assert mask[row, unit].item() == (signed >= round(0.2 * 2**32) - 2**31)


@pytest.mark.parametrize(
    ("kind", "workers", "words"),
    [
        ("columns", 3, "workers = 3: layout columns needs a multiple of 2, one worker per column; or choose another"),
        ("single", 2, "workers = 2: layout single has one; choose data, columns or hybrid"),
        ("rows", 2, "layout = 'rows': unknown; choose one of single, data, columns, hybrid"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(kind, workers, words):
    with pytest.raises(ValueError, match=words):
        Layout(kind, workers)


@pytest.mark.parametrize("kind", ["data", "hybrid"])
def test_one_worker_of_any_layout_is_the_whole_net(kind):
    found = train(0, kind, 1, torch.float64, 0.5, 2)
    for name, tensor in alone(torch.float64, 0.5, 2).items():
        assert difference(found[name], tensor) < 1e-10, name


def test_units_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="workers = 3: fc6 has 512 units, which 3 workers of layout hybrid cannot"):
        ShardedNet(build(torch.float32, 0.5), Layout("hybrid", 3))


def test_gradients_are_freed_or_zeroed_as_asked():
    sharded, _ = make(0, "single", 1, torch.float64, 0.0)
    params = list(sharded.part.parameters())
    backward(sharded, 0, torch.float64)
    grads = [param.grad for param in params]
    sharded.zero_grad(set_to_none=False)
    assert all(param.grad is grad and not grad.any() for param, grad in zip(params, grads, strict=True))
    sharded.zero_grad()
    assert all(param.grad is None for param in params)


def zero_grad_of_data_parallel(rank):
    """Whether each gradient is still the tensor that DDP reduces, and is zero."""
    sharded, _ = make(rank, "hybrid", 2, torch.float64, 0.0)
    found = {}
    for set_to_none in (True, False):
        backward(sharded, 0, torch.float64)
        before = {name: param.grad for name, param in sharded.part.named_parameters()}
        sharded.zero_grad(set_to_none)
        for name, param in sharded.part.named_parameters():
            kept = param.grad is before[name] and not param.grad.any().item()
            found[f"{set_to_none} {name}"] = "zeroed" if kept else "freed" if param.grad is None else "wrong"
    return found


@pytest.mark.slow
def test_gradients_in_ddp_s_buckets_are_zeroed_where_they_are():
    for found in run_gloo(2, zero_grad_of_data_parallel):
        for name, became in found.items():
            freed = name.startswith("True") and name.split()[1].startswith("fc")
            assert became == ("freed" if freed else "zeroed"), name
