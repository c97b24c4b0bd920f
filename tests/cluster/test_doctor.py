"""The doctor's findings from facts, and the doctor on this machine; test_cluster.py has whole clusters."""

import os
import re

import pytest

from orchestrator.cluster.diagnosis import check_clocks, check_machines, check_token, check_versions

HEALTHY = {
    "versions": {"python": "3.11.7", "ray": "2.60.0"},
    "gpus": 2,
    "gpus_of_ray": 2.0,
    "files": 65536,
    "disks": {"/tmp/ray/session": {"free": 50e9, "total": 200e9}},
    "listening": {8265: ["127.0.0.1"], 5000: ["10.0.0.5"]},
    "auth_mode": "token",
}


def nodes(**changes):
    return {"10.0.0.5 (head)": HEALTHY, "10.0.0.6": HEALTHY | changes}


def bad(findings):
    return [(finding.check, finding.where, finding.severity) for finding in findings if finding.severity != "ok"]


def all_of(found):
    return [*check_versions(found, HEALTHY), *check_machines(found), *check_token(found)]


def test_nothing_is_wrong_with_healthy_machines():
    assert bad(all_of(nodes())) == []
    checks = {finding.check for finding in all_of(nodes())}
    assert checks == {"versions", "disk", "open files", "GPUs", "ports", "token"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"versions": {"python": "3.11.7", "ray": "2.59.0"}}, ("versions", "fail")),
        ({"disks": {"/tmp": {"free": 5e9, "total": 200e9}}}, ("disk", "fail")),  # 97.5 % full
        ({"disks": {"/tmp": {"free": 4e9, "total": 20e9}}}, ("disk", "warn")),
        ({"files": 1000}, ("open files", "fail")),
        ({"files": 4096}, ("open files", "warn")),
        ({"gpus": 0}, ("GPUs", "fail")),
        ({"listening": {8265: ["10.0.0.6"]}}, ("ports", "fail")),
        ({"listening": {8265: ["::"]}}, ("ports", "fail")),
        ({"listening": {5000: ["0.0.0.0"]}}, ("ports", "fail")),
        ({"auth_mode": None}, ("token", "fail")),
        ({"auth_mode": "disabled"}, ("token", "fail")),
    ],
)
def test_each_fault_is_named_with_its_node_and_has_a_remedy(changes, expected):
    found = [finding for finding in all_of(nodes(**changes)) if finding.severity != "ok"]
    assert [(finding.check, finding.severity) for finding in found] == [expected]
    assert found[0].where == "10.0.0.6"
    assert found[0].remedy


def test_a_clock_may_be_a_second_off():
    found = check_clocks({"a": 0.02, "b": -0.9, "c": 1.5, "d": -90.0})
    assert [finding.severity for finding in found] == ["ok", "ok", "warn", "fail"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_doctor_looks_at_this_machine(job, here, tmp_path):
    done = job("doctor", cwd=tmp_path, **here)
    counts = re.search(r"^(\d+) ok, (\d+) warn, (\d+) fail$", done.stdout, re.M)
    assert counts, done.stderr
    lines = [re.findall(rf"^{severity} +[a-zA-Z]", done.stdout, re.M) for severity in ("ok", "warn", "fail")]
    assert [int(count) for count in counts.groups()] == [len(found) for found in lines]
    for check in ("nodes", "token", "versions", "clock", "storage"):
        assert re.search(rf"^ok +{check} ", done.stdout, re.M), done.stdout
    assert list(tmp_path.glob("runs/.doctor*")) == []
    assert done.returncode == (1 if int(counts[3]) else 0)


def test_a_missing_token_is_named_before_anything_is_tried(job, tmp_path):
    settings = {"RAY_ADDRESS": "127.0.0.1:9", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    done = job("doctor", cwd=tmp_path, **settings)
    assert done.returncode == 1
    assert re.search(r"^fail +token +here +RAY_AUTH_MODE is token, but there is no token$", done.stdout, re.M)
    assert "remedy: `make token`" in done.stdout
    assert done.stdout.endswith("\n0 ok, 0 warn, 1 fail\n")
    assert not os.listdir(tmp_path)
