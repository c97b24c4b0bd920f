"""A cluster that starts nodes when a job asks for them: Ray's own stand-in for a cloud, on this machine."""

import json
import os
import re

import pytest
import yaml

TYPES = {
    "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "cpu": {
        "resources": {"CPU": 3},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
        "labels": {"usd-per-hour": "36"},
    },
}


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """Its environment. The yaml is where `ray up` would have left it on the head."""
    from ray.cluster_utils import AutoscalingCluster

    cluster = AutoscalingCluster(
        head_resources=TYPES["head"]["resources"],
        worker_node_types={"cpu": TYPES["cpu"]},
        idle_timeout_minutes=5,
        autoscaler_v2=True,
    )
    config = {"provider": {"type": "aws"}, "head_node_type": "head", "max_workers": 2, "available_node_types": TYPES}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))
    cluster.start()
    try:
        auth = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        yield {"RAY_ADDRESS": "auto", "HOME": str(tmp_path), "ALEXNET_OUTPUT": str(tmp_path / "runs"), **auth}
    finally:
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.long
def test_a_job_waits_for_the_nodes_that_it_needs_and_counts_what_they_cost(job, growing, tmp_path):
    done = job("train", "--dry-run", "--images-per-s", 100, cwd=tmp_path, **growing)
    assert done.returncode == 0, done.stderr
    for words in (
        "none but the head; up to 2 more cpu (3 CPUs, 0 GPUs, $36 an hour each)",
        "would start  1 of cpu",
        "100 images/s: as stated",
        "about 7:47 for 30 epochs",  # of 1437 images, and 360 that are only looked at
        "about $4.67, at $36.00 an hour for all nodes",
    ):
        assert words in done.stdout, done.stdout
    done = job("train", "--workers", 9, cwd=tmp_path, **growing)
    assert done.returncode == 1
    assert "--workers 9: more than this cluster can grow to: 2 cpu (3 CPUs" in done.stderr
    done = job("train", "--epochs", 2, "--name", "first", cwd=tmp_path, **growing)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "waiting for nodes such as cpu" in done.stdout
    result = json.loads((tmp_path / "runs" / "first" / "result.json").read_text())
    hours = result["elapsed_s"] / 3600
    assert 0.1 * 36 * hours < result["cost_usd"] < 36 * hours, "one node, for a part of the time"
    assert re.search(rf"cost +\${result['cost_usd']:.2f} for all nodes", done.stdout)
