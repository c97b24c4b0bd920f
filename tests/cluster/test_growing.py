"""A cluster that starts nodes on demand: Ray's fake cloud provider, in a host of its own, because stopping it
ends every Ray of the machine."""

import json
import re
import time

import pytest
import yaml
from conftest import ROOT
from hosts import Network, why_not
from test_cluster import lend_environment

REASON = why_not()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.skipif(REASON is not None, reason=f"no hosts: {REASON}"),
]
TYPES = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "cpu": {
        "resources": {"CPU": 3},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
        "labels": {"usd-per-hour": "36"},
    },
}
CLOUD = {
    "cluster_name": "fake",
    "max_workers": 2,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "auth": {},
    "upscaling_speed": 1,
    "idle_timeout_minutes": 5,
    "head_node_type": "ray.head.default",
    "available_node_types": TYPES,
    "file_mounts": {},
    **{f"{when}_commands": [] for when in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray",
                                           "worker_start_ray")},
    "cluster_synced_files": [],
}  # fmt: skip
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "0",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@pytest.fixture
def growing():
    """A host with a head that can start nodes, and the yaml where `ray up` would have left it."""
    with Network() as network:
        host = network.add("cloud")
        lend_environment(host, host.home / "project")
        home = host.folder / "home/user"
        cloud = CLOUD | {"provider": CLOUD["provider"] | {"gcs_address": f"{host.address}:6379"}}
        (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(cloud))
        (home / "cloud.yaml").write_text(json.dumps(cloud))
        start = f". project/.venv/bin/activate && ray start --head --node-ip-address={host.address} --num-cpus=0"
        host.run(f"{start} --autoscaling-config=cloud.yaml --object-store-memory=500000000", **SETTINGS)

        yield Cloud(host)


class Cloud:
    def __init__(self, host):
        self.host, self.home = host, host.folder / "home/user"
        self.env = SETTINGS | {"RAY_ADDRESS": f"{host.address}:6379"}

    def job(self, command, check=True):
        return self.host.run(self._line(command), check=check, **self.env)

    def starts(self, command):
        return self.host.start(self._line(command), **self.env)

    def ray(self, command):
        return self.host.run(f". project/.venv/bin/activate && ray {command}", **self.env)

    @staticmethod
    def _line(command):
        return f". project/.venv/bin/activate && exec python -u {ROOT}/jobs/{command}"


@pytest.mark.timeout(900)
def test_a_job_waits_for_the_nodes_that_it_needs(growing):
    job, home = growing.job, growing.home
    dry = job("train.py --dry-run --images-per-s 100").stdout
    for words in (
        "none but the head; up to 2 more cpu (3 CPUs, 0 GPUs, $36 per hour each)",
        "would start     1 of cpu",
        "100 images/s: as stated",
        "about 7:47 for 30 epochs",  # of 1437 images, and 360 that are only looked at
        "about $4.67, at $36.00 per hour for all nodes",
    ):
        assert words in dry, dry
    done = job("train.py --workers 8", check=False)
    assert done.returncode == 1
    assert "--workers 8: more than this cluster can grow to: 2 cpu (3 CPUs" in done.stderr
    done = job("train.py --epochs 2 --name first")
    print(done.stdout)
    assert re.search(r"waiting for nodes such as cpu: 0 joined after 0 s", done.stdout)
    result = json.loads((home / "runs/first/result.json").read_text())
    assert result["status"] == "FINISHED"
    most = 36 * result["elapsed_s"] / 3600
    assert 0.1 * most < result["cost_usd"] < most, "one node, for a part of the time"
    assert re.search(rf"  cost +\${result['cost_usd']:.2f} for all nodes", done.stdout)


@pytest.mark.timeout(900)
def test_an_elastic_run_asks_for_nodes_to_grow_and_one_that_lost_its_nodes_for_others(growing):
    run = growing.starts("train.py --epochs 500 --name elastic --workers 1..4 --layout data")

    def until(words):
        seen = []
        for line in run.stdout:
            seen.append(line)
            if re.search(words, line):
                print(line, end="")
                return
        raise AssertionError(f"{words} did not come: {''.join(seen)}")

    until(r"training on cpu in \w+, 2 workers")  # one node, of three CPUs
    until("the cluster has room for more workers")
    until(r"4 workers, resumed after epoch")
    until("epoch .*train loss")
    growing.host.run("pkill -9 -f 'raylet/raylet .*CPU,3'")
    until(r"(1 node was|2 nodes were) lost")  # seen at once, or one after the other
    deadline = time.monotonic() + 120
    while "{'CPU': 1.0} * 2 (PACK): 1+ pending placement groups" not in growing.ray("status").stdout:
        assert time.monotonic() < deadline, "nobody asks for a node"
        time.sleep(1)
    # the stand-in does not notice that what it started is gone, and starts nothing in its place
    growing.ray(f"start --address {growing.env['RAY_ADDRESS']} --num-cpus 3 --object-store-memory 500000000")
    until(r"2 workers, resumed after epoch")
    until("epoch .*train loss")
    growing.host.run(f"pkill -INT -f 'python -u {ROOT}/jobs/train.py'")
    until("stopped; resume with")
    assert run.wait(60) == 130
