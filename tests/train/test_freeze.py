"""Layers that are frozen, and layers that learn at rates of their own: in every layout, and through checkpoints."""

import json
import math

import pytest
import test_layouts
import torch
from gloo import run_gloo
from safetensors.torch import load_file

import alexnet
from alexnet.layouts import Layout, ShardedNet
from alexnet.trained import Description
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.train import checkpoints
from orchestrator.train.model import build_net, make_optimizer
from orchestrator.train.pretrained import Pretrained

CLASSES, DTYPE = test_layouts.CLASSES, torch.float64
# by name: what is frozen, and which factors the rates have
CASES = {
    "first": {"freeze": "conv1,conv2", "lr_factor": "conv=0.5,fc8=3"},
    "features": {"freeze": "conv", "lr_factor": "none"},  # hybrid: nothing is left to train in data parallel
    "middle": {"freeze": "conv3,fc6", "lr_factor": "none"},
    "classifier": {"freeze": "fc", "lr_factor": "conv1=2"},
}


def pieces(rank=0, kind="single", workers=1, **settings):
    config = digits().changed(width=0.125, **settings)
    net = ShardedNet(build_net(config, CLASSES).to(DTYPE), Layout(kind, workers), rank)
    optimizer = make_optimizer(config, net.part)
    return net, optimizer, alexnet.plateau_schedule(optimizer)


def run(net, optimizer, steps):
    for step in steps:
        test_layouts.backward(net, step, DTYPE)
        assert all((param.grad is None) != param.requires_grad for param in net.parameters())
        optimizer.step()
        net.zero_grad()


def whole(net):
    return test_layouts.collected(net, dict(net.part.named_parameters()), "weight")


def train_all(rank, root, workers):
    """In every layout and case two steps, a checkpoint, and two steps in the next layout from there."""
    found = {}
    kinds = ("data", "columns", "hybrid")
    for case, settings in CASES.items():
        for kind, then in zip(kinds, (*kinds[1:], kinds[0]), strict=True):
            folder = root / case / kind
            net, optimizer, schedule = pieces(rank, kind, workers, **settings)
            run(net, optimizer, range(2))
            if rank in net.layout.group_of(0):
                checkpoints.save(folder if rank == 0 else None, net, optimizer, schedule, checkpoints.State(step=2))
            torch.distributed.barrier()
            net, optimizer, schedule = pieces(rank, then, workers, **settings)
            assert checkpoints.load(folder, net, optimizer, schedule) == checkpoints.State(step=2)
            run(net, optimizer, range(2, 4))
            found[case, kind] = whole(net)
    for kind in kinds:  # the weights of a trained net: the first case's checkpoint, of the same seed as all others
        net = pieces(rank, kind, workers, seed=1)[0]
        description = Description({"num_classes": CLASSES}, tuple("abcdefg"))
        start = Pretrained(StoragePath.of(root / "first" / "data"), description)
        start.load_weights(net, "abcdefg" if kind != "data" else "abcdefh", CLASSES)
        found["start", kind] = whole(net)
    return found


@pytest.mark.slow
def test_in_every_layout_frozen_layers_stay_bit_for_bit_and_the_others_learn_as_in_one_process(tmp_path):
    torch.set_num_threads(1)
    for case in CASES:
        for kind in ("data", "columns", "hybrid"):
            (tmp_path / case / kind).mkdir(parents=True)
    wanted, first = {}, {}
    for case, settings in CASES.items():
        net, optimizer, _ = pieces(**settings)
        first[case] = {name: param.detach().clone() for name, param in net.part.named_parameters()}
        run(net, optimizer, range(4))
        wanted[case] = whole(net)
    everything = run_gloo(4, train_all, tmp_path, 4)[0]
    started = {kind: everything.pop(("start", kind)) for kind in ("data", "columns", "hybrid")}
    source, fresh = load_file(tmp_path / "first" / "data" / "model.safetensors"), whole(pieces(seed=1)[0])
    for kind, found in started.items():
        for name, tensor in source.items():
            anew = kind == "data" and name.startswith("fc8.")  # one class is another there
            assert torch.equal(found[f"weight {name}"], fresh[f"weight {name}"] if anew else tensor), (kind, name)
    for (case, kind), found in everything.items():
        frozen = {name for name, param in pieces(**CASES[case])[0].part.named_parameters() if not param.requires_grad}
        assert {name.split(".")[0] for name in frozen} == set(build_frozen(CASES[case]["freeze"])), (
            "the net freezes what the setting names"
        )
        saved, velocities = (
            load_file(tmp_path / case / kind / f"{name}.safetensors") for name in ("model", "velocity")
        )
        assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in first[case].items()}
        assert velocities.keys() == saved.keys() - frozen
        for name, start in first[case].items():
            ours, theirs = found[f"weight {name}"], wanted[case][f"weight {name}"]
            assert test_layouts.difference(ours, theirs) < 1e-10, (case, kind, name)
            assert torch.equal(ours, start) == (name in frozen), (case, kind, name)
            assert torch.equal(saved[name], start) == (name in frozen), (case, kind, name)


def build_frozen(text):
    return (
        ["conv1", "conv2", "conv3", "conv4", "conv5"]
        if text == "conv"
        else (["fc6", "fc7", "fc8"] if text == "fc" else text.split(","))
    )


def graph_of(net):
    """How often each kind of node is in the graph of the loss, and whether an image's gradient would be computed."""
    images, labels = test_layouts.global_batch(0, DTYPE)
    loss = torch.nn.functional.cross_entropy(net(images, None, [len(images)]), labels)
    seen, todo, kinds, inputs = set(), [loss.grad_fn], {}, []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kinds[node.name()] = kinds.get(node.name(), 0) + 1
        if "Convolution" in node.name():
            inputs.append(node.next_functions[0][0] is not None)
        todo += [child for child, _ in node.next_functions]
    return kinds, inputs


def test_nothing_below_the_first_trained_layer_is_differentiated():
    """Convolutions, LRN and poolings whose gradients are computed, and for how many of the convolutions that of the
    input is."""

    def counted(freeze):
        kinds, inputs = graph_of(pieces(freeze=freeze)[0])
        norms = sum(count for kind, count in kinds.items() if "LocalResponseNorm" in kind)
        return kinds.get("ConvolutionBackward0", 0), norms, kinds.get("MaxPool2DWithIndicesBackward0", 0), sum(inputs)

    assert counted("none") == (5, 2, 3, 4)
    assert counted("conv1") == (4, 1, 2, 3)
    assert counted("conv1,conv2") == (3, 0, 1, 2)
    assert counted("conv") == (0, 0, 0, 0)
    assert counted("fc") == (5, 2, 3, 4)


def test_a_rate_s_factor_multiplies_the_whole_update_by_the_paper_s_rule():
    """Two steps, so that velocities count, against the rule written out."""
    net, optimizer, _ = pieces(lr_factor="conv=0.1,conv2=4,fc8=10", lr=0.02, weight_decay=0.01)
    twin = pieces()[0]
    factors = dict.fromkeys(("conv1", "conv3", "conv4", "conv5"), 0.1) | {"conv2": 4.0, "fc8": 10.0}
    velocities = {name: torch.zeros_like(param) for name, param in twin.part.named_parameters()}
    for step in range(2):
        run(net, optimizer, [step])
        test_layouts.backward(twin, step, DTYPE)
        for name, param in twin.part.named_parameters():
            rate = 0.02 * factors.get(name.split(".")[0], 1.0)
            velocities[name] = 0.9 * velocities[name] - 0.01 * rate * param.detach() - rate * param.grad
            param.data += velocities[name]
        twin.zero_grad()
    for (name, ours), theirs in zip(net.part.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15, msg=name)


def test_without_factors_there_is_one_group_and_the_first_has_the_base_rate_always():
    net, optimizer, _ = pieces()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01]
    assert [id(param) for param in optimizer.param_groups[0]["params"]] == [id(param) for param in net.parameters()]
    _, optimizer, _ = pieces(lr_factor="conv=0.1,fc=10")
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [
        (0.01, 0), (pytest.approx(0.001), 10), (pytest.approx(0.1), 6),
    ]  # fmt: skip


def test_a_plateau_divides_all_rates_alike_however_small():
    _, optimizer, schedule = pieces(lr_factor="conv=0.00001,fc8=10", lr=0.001)
    for drops in range(6):
        divided = 0.1 ** min(drops, 3)
        wanted = [pytest.approx(rate * divided, rel=1e-9) for rate in (0.001, 1e-8, 0.01)]
        assert [group["lr"] for group in optimizer.param_groups] == wanted
        for _ in range(6 + (drops == 0)):
            schedule.step(0.5)


def test_a_checkpoint_has_the_rate_of_each_group_the_base_rate_first(tmp_path):
    net, optimizer, schedule = pieces(lr_factor="conv=0.1,fc8=10")
    run(net, optimizer, range(1))
    for _ in range(7):
        schedule.step(0.5)
    checkpoints.save(tmp_path, net, optimizer, schedule, checkpoints.State())
    assert json.loads((tmp_path / "state.json").read_text())["lr"] == pytest.approx([1e-3, 1e-4, 1e-2])
    again, optimizer2, schedule2 = pieces(lr_factor="conv=0.1,fc8=10")
    checkpoints.load(tmp_path, again, optimizer2, schedule2)
    assert [group["lr"] for group in optimizer2.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert math.isclose(schedule2.min_lrs[2], 1e-4)
    for pair in ((net, optimizer), (again, optimizer2)):
        run(*pair, range(1, 3))
    for (name, a), b in zip(net.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
