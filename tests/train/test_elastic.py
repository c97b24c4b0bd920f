"""A run that follows the cluster: a node is taken away, and comes back."""

import json
import os
import queue
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, assert_same_history


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
    run.until(f"training on cpu in fp64, {many} worker(s)", 120)
    run.until("epoch 2/10  train loss")
    cluster.remove_node(nodes[1], allow_graceful=False)
    assert run.until(f"training on cpu in fp64, {few} worker(s), resumed after epoch") < 60
    run.until("  train loss")
    cluster.add_node(num_cpus=cpus, node_ip_address="127.0.0.5")
    run.until("the cluster has room for more workers")
    run.until(f"training on cpu in fp64, {many} worker(s), resumed after epoch", 120)
    run.until("results after 10 epochs", 120)
    assert run.process.wait(60) == 0

    history = json.loads((tmp_path / "runs" / "elastic" / "result.json").read_text())["history"]
    assert [entry["epoch"] for entry in history] == list(range(1, 11))
    assert_same_history(history, recorded)
