"""A run that follows the cluster's nodes: what it asks about them, and that it loses one and gets one back."""

import json
import os
import queue
import subprocess
import sys
import threading
import time

import pytest
import ray
from conftest import ROOT, assert_same_history

from orchestrator.cluster.nodes import Node
from orchestrator.cluster.placement import make_plan
from orchestrator.config.train import make_config
from orchestrator.train import elastic
from orchestrator.train.elastic import ElasticPlanner


class Cluster:
    """Nodes, free resources and requests, as a planner sees them."""

    def __init__(self, monkeypatch):
        self.nodes, self.free, self.types, self.requests = [], {}, ["a type"], []
        monkeypatch.setattr(ray, "nodes", list)
        monkeypatch.setattr(ray, "available_resources", lambda: self.free)
        monkeypatch.setattr(ray, "cluster_resources", dict)
        monkeypatch.setattr(elastic, "alive", lambda _: list(self.nodes))
        monkeypatch.setattr(elastic, "node_types", lambda: self.types)
        monkeypatch.setattr(elastic, "CapacityRequest", self.request)

    def request(self, config, workers, *, on_gpu):
        made = Request(workers)
        self.requests.append(made)
        return made


class Request:
    def __init__(self, workers):
        self.workers, self.is_ready, self.released = workers, False, 0

    def ready(self, within_s):
        return self.is_ready

    def release(self):
        self.released += 1


@pytest.fixture
def nodes(monkeypatch):
    return Cluster(monkeypatch)


def planner_of(num_concurrent=0, **settings):
    return ElasticPlanner(make_config(**settings, device="cpu"), 10, num_concurrent)


@pytest.mark.parametrize(
    ("settings", "workers_on", "expected"),
    [
        ({"workers": 1}, ["a"], ""),  # the tasks of its feed take turns
        ({"workers": 2, "layout": "data"}, ["a", "a"], "feed"),  # whose tasks would no longer fit at once
        ({"workers": 2, "layout": "data"}, ["a", "idle"], "workers"),
        ({"workers": 1}, [], "workers"),  # it has not started: nobody knows where it would
    ],
)
def test_a_run_leaves_its_workers_alone_when_a_node_is_lost_that_it_does_not_need(
    nodes, settings, workers_on, expected
):
    nodes.nodes, planner = [Node("a", 4), Node("idle", 4)], planner_of(**settings)
    plan = planner.plan()
    assert planner.lost(plan, workers_on) == ""
    nodes.nodes = nodes.nodes[:1]
    assert planner.lost(plan, workers_on) == expected
    assert planner.lost(plan, workers_on) == expected
    assert planner.lost_nodes() == {"idle"}
    assert planner.untolerated_losses() == (set() if expected == "" else {"idle"})


def test_a_new_plan_forgets_what_was_lost_before(nodes):
    nodes.nodes, planner = [Node("a", 4), Node("b", 4)], planner_of(workers=1)
    plan = planner.plan()
    nodes.nodes = nodes.nodes[:1]
    assert planner.lost(plan, ["a"]) == ""
    planner.plan()
    assert (planner.planned_nodes, planner.tolerated_losses, planner.lost_nodes()) == ({"a"}, set(), set())


@pytest.mark.parametrize(
    ("workers", "free", "expected"),
    [
        ("1..4", {"CPU": 1.5}, True),  # 3 workers more, of half a CPU each
        ("1..4", {"CPU": 1.4}, False),  # another job has what is missing
        ("1..4", {}, False),
        ("1..1", {"CPU": 9.0}, False),
        ("1", {"CPU": 9.0}, False),
    ],
)
def test_a_run_grows_only_into_room_that_is_free(nodes, workers, free, expected):
    nodes.nodes, planner = [Node("a", 1)], planner_of(workers=workers, layout="data", global_batch_size=64)
    plan = planner.plan()
    assert plan.layout.workers == 1
    nodes.nodes, nodes.free = [Node("a", 1), Node("b", 8)], free
    assert make_plan(planner.config, nodes.nodes, 10).layout.workers == (4 if workers == "1..4" else 1)
    assert planner.could_grow(plan) is expected


def test_capacity_is_requested_for_the_next_larger_number_of_workers(nodes):
    nodes.nodes = [Node("a", 1)]
    planner = planner_of(workers="1..4", layout="data", global_batch_size=64)
    plan = planner.plan()
    assert planner.capacity(plan) == "none"
    planner.request_capacity(plan)
    [request] = nodes.requests
    assert (request.workers, planner.capacity(plan)) == (1, "pending")
    request.is_ready = True
    assert planner.capacity(plan) == "ready"
    planner.release_capacity()
    planner.release_capacity()
    assert (request.released, planner.capacity(plan)) == (1, "none")


@pytest.mark.parametrize("why", ["no larger number", "no nodes to start", "a trial"])
def test_capacity_that_cannot_be_had_is_not_requested(nodes, why):
    nodes.nodes = [Node("a", 1)]
    planner = planner_of(workers="1..1" if why == "no larger number" else "1..2", layout="data")
    plan = planner.plan()
    planner.num_concurrent = 2 if why == "a trial" else 0
    nodes.types = [] if why == "no nodes to start" else ["a type"]
    assert planner.capacity(plan) == "unavailable"


def test_a_run_without_room_requests_it_once_and_plans_when_it_is_there(nodes, monkeypatch):
    planner, warnings, seconds = planner_of(workers=2, layout="data"), [], [0.0]

    def sleep(for_s):
        seconds[0] += for_s
        if seconds[0] >= 200:
            nodes.nodes = [Node("a", 4)]

    monkeypatch.setattr(elastic.time, "sleep", sleep)
    monkeypatch.setattr(elastic.time, "monotonic", lambda: seconds[0])
    plan = planner.wait_for_room(lambda: None, warnings.append)
    assert plan.layout.workers == 2
    assert warnings == ["the cluster has no room for 2 workers now; waiting for nodes"] * 3  # at 0, 92 and 184 s
    [request] = nodes.requests
    assert (request.workers, request.released) == (2, 1)


def test_waiting_for_room_ends_when_the_run_is_cancelled(nodes):
    planner = planner_of(workers=2, layout="data")

    def cancelled():
        raise KeyError

    with pytest.raises(KeyError):
        planner.wait_for_room(cancelled, print)


ROOM = (
    "the room for 2 workers is reserved, and the processes are still starting, which takes long on a busy machine or "
)
PLACED = (
    "the cluster has free what 2 workers take together (CPU 2 of CPU 2), but not where they can be placed (PACK), or "
)


@pytest.mark.parametrize(
    ("group", "free", "why"),
    [
        ("ab", 0, ROOM + "from a slow disk"),
        ("cd", 2, PLACED + "Ray has yet to place them"),
        ("cd", 1, "they wait for room; 2 workers take CPU 2, and the cluster has free: CPU 1"),
        (None, 0, "they wait for room; 2 workers take CPU 2, and the cluster has free: CPU 0"),
    ],
)
def test_workers_that_have_not_started_wait_for_what_is_said(nodes, monkeypatch, group, free, why):
    nodes.nodes = [Node("a", 4, 0)]
    planner = planner_of(workers=2, layout="data")
    plan = planner.plan()
    assert plan.resources.per_worker() == {"CPU": 1}
    nodes.free = {"CPU": free} if free else {}
    monkeypatch.setattr(elastic, "_is_reserved", lambda group: group == "ab")
    assert planner.why_waiting(plan, group) == f"the workers have not started in 90 s: {why}"


@pytest.mark.ray
def test_a_placement_group_is_reserved_when_it_has_its_resources(ray_here):
    small, large = (ray.util.placement_group([{"CPU": cpus}]) for cpus in (0.1, 10_000))
    try:
        ray.get(small.ready())
        assert [elastic._is_reserved(group.id.hex()) for group in (small, large)] == [True, False]
    finally:
        for group in (small, large):
            ray.util.remove_placement_group(group)


# on a cluster


@pytest.fixture
def cluster(cpus, compiled):
    """A head without CPUs, where the driver is, and two nodes: several raylets on this machine's loopback."""
    from ray.cluster_utils import Cluster

    # not 127.0.0.1, which Ray replaces by the machine's own address
    quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=cpus, node_ip_address=f"127.0.0.{last}") for last in (3, 4)]
    yield cluster, nodes
    cluster.shutdown()


class Job:
    """jobs/train.py on the cluster, and its lines as they come."""

    def __init__(self, address, folder, *args):
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"RAY_ADDRESS": address}
        command = [sys.executable, "-u", str(ROOT / "jobs" / "train.py"), "digits", *args]
        to = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=to, stderr=subprocess.STDOUT, text=True)
        self.lines, self.seen = queue.Queue(), []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def until(self, words, within_s=60):
        """Seconds until a line with these words came."""
        start = time.monotonic()
        while (left := start + within_s - time.monotonic()) > 0:
            try:
                line = self.lines.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                break
            self.seen.append(line)
            if words in line:
                return time.monotonic() - start
        self.process.kill()
        raise AssertionError(f"{words!r} did not come: {''.join(self.seen)}")


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("cpus", "few", "many", "layout"),
    [(1, 1, 2, "data"), (2, 2, 4, "columns")],
)
def test_a_run_shrinks_with_a_lost_node_and_grows_with_a_new_one_and_its_losses_do_not_change(
    cluster, tmp_path, recorded, cpus, few, many, layout
):
    cluster, nodes = cluster
    ever = ("--epochs", "10", "--precision", "fp64")
    run = Job(cluster.address, tmp_path, *ever, "--name", "elastic", "--workers", f"{few}..{many}", "--layout", layout)
    run.until(f"training on cpu in fp64, {many} worker", 120)
    run.until("epoch 2/10  train loss")
    cluster.remove_node(nodes[1], allow_graceful=False)
    assert run.until(f"training on cpu in fp64, {few} worker{'s' if few > 1 else ''}, resumed after epoch") < 60
    run.until("  train loss")
    cluster.add_node(num_cpus=cpus, node_ip_address="127.0.0.5")
    run.until("the cluster has room for more workers")
    run.until(f"training on cpu in fp64, {many} workers, resumed after epoch", 120)
    run.until("results after 10 epochs", 120)
    assert run.process.wait(60) == 0

    history = json.loads((tmp_path / "runs" / "elastic" / "result.json").read_text())["history"]
    assert [entry["epoch"] for entry in history] == list(range(1, 11))
    assert_same_history(history, recorded)
