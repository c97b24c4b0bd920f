"""Which layout, on which workers, on which nodes."""

import re

import pytest

from alexnet.cost import estimate
from alexnet.layouts import Layout
from orchestrator.base.exits import JobError
from orchestrator.cluster.layout_choice import choose_layout, ledger, memory_per_worker, worker_counts
from orchestrator.cluster.nodes import Node, alive
from orchestrator.cluster.placement import make_plan, room_for, share_cpus, too_many_workers
from orchestrator.config.recipes import digits, imagenet
from orchestrator.config.train import make_config

CPU, GPUS = Node("a", cpus=2), Node("g", cpus=32, gpus=4, accelerator="A100")


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16, 96])
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 64])
def test_workers_and_every_worker_s_feed_fit_at_once(cpus, workers):
    share = share_cpus(cpus, 0, workers)
    assert share.worker_cpus > 0
    assert share.feed_cpus > 0
    assert workers * (share.worker_cpus + share.feed_tasks * share.feed_cpus) <= cpus + 1e-9


def test_gpus_are_used_when_there_is_one_for_each_worker_and_never_silently_left():
    assert share_cpus(16, 2, 2).use_gpu
    assert not share_cpus(16, 0, 2).use_gpu
    with pytest.raises(JobError, match="--workers 4: the cluster has 2 GPU"):
        share_cpus(16, 2, 4)
    with pytest.raises(JobError, match="has 0 GPU"):
        share_cpus(16, 0, 1, "gpu")
    assert not share_cpus(16, 1, 2, digits().device).use_gpu  # make train on a machine with one GPU
    with pytest.raises(JobError, match="no CPUs"):
        share_cpus(0, 0, 1)


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"workers": 4}, [4]),
        ({"workers": "2..8", "layout": "columns"}, [8, 4, 2]),  # 6 does not divide 128
        ({"workers": "2..8", "layout": "columns", "global_batch_size": 120}, [8, 6, 4, 2]),
        ({"workers": "1..3", "layout": "single"}, [1]),
        ({"workers": "3..5", "layout": "data"}, [4]),
        ({"workers": "2..4", "layout": "hybrid", "global_batch_size": 96}, [4, 2]),  # 3 cannot share 4096 units
        ({"workers": "1..4", "layout": "hybrid"}, [4, 2, 1]),
    ],
)
def test_an_elastic_run_has_the_numbers_of_workers_that_its_layout_and_batch_allow(fields, counts):
    assert worker_counts(make_config(**fields)) == counts


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"global_batch_size": 100, "workers": 3}, "global_batch_size = 100: not divisible by 3 workers; 99 or 102"),
        ({"workers": 3, "layout": "columns", "global_batch_size": 99}, "workers = 3: layout columns needs a multiple"),
        ({"workers": 2, "layout": "single"}, "workers = 2: layout single has one"),
        ({"workers": 3, "layout": "columns"}, "workers = 3: layout columns needs a multiple of 2"),
        ({"workers": "5..7"}, "workers = 5..7: none of these numbers works; for 7: global_batch_size = 128"),
    ],
)
def test_workers_that_will_not_do_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        worker_counts(make_config(**fields))


def test_units_that_cannot_be_shared_are_refused_by_name():
    config = digits().changed(workers=3, layout="hybrid", global_batch_size=63)
    with pytest.raises(ValueError, match="workers = 3: fc6 has 1024 units, which 3 workers of layout hybrid cannot"):
        choose_layout(config, 3, 10, [CPU], use_gpu=False)


def test_auto_takes_the_cheapest_layout_and_says_why():
    config = imagenet()
    assert choose_layout(config, 1, 1000, [CPU], use_gpu=False)[0].kind == "single"
    for workers, nodes, use_gpu in ((2, [CPU], False), (4, [GPUS], True), (3, [Node("h", 8, 3)], True)):
        layout, reason = choose_layout(config.changed(global_batch_size=120), workers, 1000, nodes, use_gpu)
        assert layout.workers == workers
        assert reason.startswith(f"layout {layout.kind} over {workers} workers (auto): about ")
        assert re.search(r"each sends [\d,.]+ MB and holds [\d.]+ GB", reason)
        assert "\n" not in reason
    # data parallelism would send all 61 million gradients over the network in every step
    far = [Node(name, cpus=8, gpus=1) for name in "ab"]
    layout, reason = choose_layout(config, 2, 1000, far, use_gpu=True)
    assert layout.kind == "hybrid"
    assert re.search(r"\(data [\d,]+ ms\)$", reason), "columns would split a pair"


def test_auto_leaves_what_does_not_fit_into_memory():
    node = [Node("g", 8, 2, accelerator="T4")]
    fits = {kind: Layout(kind, 2) for kind in ("columns", "data", "hybrid")}
    settings = {"num_classes": 1000, "input_size": 224, "width": 1.0, "global_batch_size": 4600}
    sizes = {kind: estimate(**settings, layout=layout).memory_bytes for kind, layout in fits.items()}
    assert [kind for kind, size in sizes.items() if size <= 16e9] == ["data", "hybrid"]
    layout, reason = choose_layout(imagenet().changed(global_batch_size=4600), 2, 1000, node, use_gpu=True)
    assert layout.kind != "columns"
    assert re.search(r"columns [\d,]+ ms, too large", reason)
    layout, reason = choose_layout(imagenet().changed(global_batch_size=9000), 2, 1000, node, use_gpu=True)
    sizes = {k: estimate(**settings | {"global_batch_size": 9000}, layout=f).memory_bytes for k, f in fits.items()}
    assert sizes[layout.kind] == min(sizes.values())
    assert reason.endswith("no layout fits into a worker's 16 GB")


def test_the_poorest_node_s_memory_counts():
    nodes = [Node("a", 8, memory_bytes=64e9), Node("b", 8, memory_bytes=4e9), Node("head", 0, memory_bytes=1e9)]
    assert memory_per_worker(nodes, 4, use_gpu=False) == 2e9


def test_the_ledger_knows_the_precision():
    sent = {p: ledger(digits().changed(precision=p), 2, 10)[0][1] for p in ("fp32", "fp64")}
    assert " 5.1 MB sent" in sent["fp32"]
    assert " 10.2 MB sent" in sent["fp64"]


def test_a_group_of_columns_is_never_split_over_nodes():
    config = make_config(workers=4, layout="columns", device="gpu")
    plan = make_plan(config, [Node("a", 8, 3), Node("b", 8, 3)], 1000)
    assert plan.node_of_worker == ("a", "a", "b", "b")
    assert make_plan(config.changed(workers=2), [Node("a", 8, 3), Node("b", 8, 3)], 1000).strategy() == "STRICT_PACK"
    alone = make_plan(config, [Node("a", 8, 4)], 1000)
    assert alone.node_of_worker == ()
    # 3 + 1 GPUs hold four workers, but only one pair
    with pytest.raises(JobError, match=r"no room for 2 groups of 2 workers, each group on one node"):
        make_plan(config, [Node("a", 8, 3), Node("b", 8, 1)], 1000)


def test_a_worker_asks_for_no_more_cpus_than_there_are_beside_its_gpu():
    nodes = [Node("head", 60), Node("g", 2, 4)]
    plan = make_plan(make_config(workers=4, layout="columns"), nodes, 1000)
    assert plan.node_of_worker == ("g",) * 4
    assert plan.resources.worker_cpus * 4 <= 2
    assert make_plan(make_config(workers="2..4", layout="columns"), [Node("g", 0, 4)], 1000) is None


def test_an_elastic_run_takes_what_there_is():
    config = digits().changed(workers="2..8")
    nodes = [Node(name, cpus=2) for name in "abc"]
    assert make_plan(config, nodes[:1], 10).layout.workers == 2
    plan = make_plan(config, nodes[:2], 10)
    assert (plan.layout.workers, plan.layout.replicas, plan.node_of_worker) == (4, 2, ("a", "a", "b", "b"))
    assert make_plan(config, nodes, 10).layout.workers == 4  # six do not divide the batch of 64
    assert make_plan(config, [Node("a", cpus=1)], 10) is None
    assert make_plan(config, [*nodes[:1], Node("head", cpus=0)], 10).node_of_worker == ("a", "a")


def test_nodes_are_read_from_ray_but_for_a_head_that_computes_nothing():
    gpu = {"CPU": 8.0, "GPU": 2.0, "memory": 1e9, "accelerator_type:T4": 1.0}
    nodes = [
        {"NodeID": "b", "Alive": True, "Resources": gpu},
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}},
        {"NodeID": "head", "Alive": True, "Resources": {"memory": 1e9}},
        {"NodeID": "c", "Alive": False, "Resources": gpu},
    ]
    assert alive(nodes) == [Node("a", 2, 0, None, None), Node("b", 8, 2, 1e9, "T4")]


def test_the_ledger_has_a_line_for_every_layout_that_can_be():
    names = [name for name, _ in ledger(digits(), 2, 10)]
    assert names == ["layout data", "layout columns", "layout hybrid"]
    assert [name for name, _ in ledger(digits(), 3, 10)] == ["layout data"]
    assert ledger(digits(), 1, 10)[0][1].endswith("nothing sent")


def test_trials_whose_workers_are_spread_take_a_node_for_each():
    config, nodes = make_config(workers=2, layout="data", spread=True, device="cpu"), [Node("a", 8), Node("b", 8)]
    assert room_for(config.changed(spread=False), nodes, 4) == 4
    assert room_for(config, nodes, 4) == 1
    assert make_plan(config, nodes, 10, num_concurrent=1)
    with pytest.raises(JobError, match="--workers 2 --spread: one node per worker is needed"):
        make_plan(config, nodes[:1], 10, num_concurrent=room_for(config, nodes[:1], 4))


def test_trials_of_two_columns_need_nodes_that_hold_a_pair():
    config = make_config(workers=2, layout="columns", device="cpu")
    small = [Node(name, cpus=1) for name in "abcdefgh"]
    assert make_plan(config, small, 10, num_concurrent=4).node_of_worker == ()  # half a CPU a worker
    with pytest.raises(JobError, match=r"no room for 1 group of 2 workers, each group on one node"):
        make_plan(config, small, 10, num_concurrent=2)  # a CPU a worker, and no node has two
    assert make_plan(config, [Node("a", 4), Node("b", 4)], 10, num_concurrent=2).strategy() == "STRICT_PACK"
    left = [Node("a", 8, 2), Node("b", 8, 2)]  # of three such nodes: one at a time waits, the search goes on
    assert make_plan(config.changed(device="gpu"), left, 10, num_concurrent=3)


@pytest.mark.parametrize(
    ("fields", "cpus", "gpus", "said"),
    [
        (
            {"workers": 16},
            2,
            0,
            "--workers 16: this machine has 2 CPUs, room for 4 workers at most; use --workers 4 or",
        ),
        ({"workers": 4}, 1, 0, "this machine has 1 CPU, room for 2 workers at most"),
        ({"workers": 8}, 2, 0, "room for 4 workers at most"),
        ({"workers": 4}, 2, 0, None),
        ({"workers": "4..8"}, 2, 0, "--workers 4..8: this machine has 2 CPUs, room for 2"),
        ({"workers": "2..8"}, 1, 0, "--workers 2..8: this machine has 1 CPU, room for 1"),  # or it waits for ever
        ({"workers": 4}, 16, 2, "has 2 GPUs, room for 2 workers at most; use --workers 2 or --device cpu or a cl"),
        ({"workers": 32}, 16, 2, "has 2 GPUs, room for 2 workers at most; use --workers 2 or a cluster"),
        (
            {"workers": 1, "device": "gpu"},
            2,
            0,
            "has 0 GPUs, room for 0 workers at most; use --device cpu or a clu",
        ),
        ({"workers": 2}, 1, 0, None),
        ({"workers": 16}, 16, 0, None),
        ({"workers": "1..8"}, 2, 0, None),
        ({"workers": 4, "device": "cpu"}, 4, 2, None),
        ({"workers": 2}, 1, 2, None),
    ],
)
def test_more_workers_than_a_machine_has_room_for_are_refused(fields, cpus, gpus, said):
    found = too_many_workers(make_config(**fields), cpus, gpus)
    assert found is None if said is None else said in found
