"""The files that describe clusters, checked against Ray's own schema and this project's lock; nothing is started."""

import json
import re
import subprocess
import time

import pytest
import yaml
from conftest import ROOT

import alexnet
from orchestrator.cluster.prices import Meter, NodeType, node_types, read_bootstrap, usd_per_hour, would_start
from orchestrator.cluster.tunnel import Head
from orchestrator.config.train import make_config

FILES = ["cluster.yaml", "clusters/onprem.yaml"]


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def lock():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(re.match(r"([\w.-]+)==([^ ;]+)", line).groups() for line in lines)


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file_with_its_own_defaults(name, monkeypatch, tmp_path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    prepared = prepare_config(read(name))
    validate_config(prepared)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands"):
        assert prepared[commands] == read(name)[commands], f"Ray's own {commands} would be taken"
    with pytest.raises(Exception, match="typo"):
        validate_config(prepared | {"typo": 1})


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_sent_exists_and_no_environment_is(name):
    sent = read(name)["file_mounts"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for target, source in sent.items():
        assert target == f"~/alexnet/{source}"
        assert source == ".ray-token" or (ROOT / source).exists(), source
    needed = {path.split("/")[0] for path in listed if path.startswith(("alexnet/", "orchestrator/", "jobs/"))}
    assert needed <= set(sent.values())
    assert not {".git", ".venv", "runs", ".", ""} & set(sent.values())


@pytest.mark.parametrize("name", FILES)
def test_nodes_require_the_token_and_do_not_listen_on_every_address(name):
    config, text = read(name), (ROOT / name).read_text()
    head, worker = "\n".join(config["head_start_ray_commands"]), "\n".join(config["worker_start_ray_commands"])
    for commands in (head, worker):
        assert commands.count(". clusters/environment") == len(re.findall(r"cd ~/alexnet", commands))
    assert "export RAY_AUTH_MODE=token" in (ROOT / "clusters/environment").read_text()
    assert "--dashboard-host=127.0.0.1" in head
    assert 'tracking.py start --host "$NODE_ADDRESS"' in head
    assert "--num-cpus=0" in head, "no trials on the head"
    assert "0.0.0.0" not in re.sub(r"CidrIp: 0\.0\.0\.0/0", "", text)


def rules_open_to_the_world(config):
    """Of the group that Ray makes: its own rules, and what the yaml adds."""
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    added = config["provider"].get("security_group", {}).get("IpPermissions", [])
    rules = _create_default_inbound_rules(["sg-1"], added)
    assert len({str(rule).lower() for rule in rules}) == len(rules), "EC2 refuses a group with a rule twice"
    for rule in rules:
        ranges = [*(each["CidrIp"] for each in rule.get("IpRanges", [])),
                  *(each["CidrIpv6"] for each in rule.get("Ipv6Ranges", []))]  # fmt: skip
        if {"0.0.0.0/0", "::/0"} & set(ranges):
            yield (rule.get("FromPort"), rule.get("ToPort"))


def test_only_ssh_is_exposed():
    assert set(rules_open_to_the_world(read("cluster.yaml"))) == {(22, 22)}
    opened = read("cluster.yaml")
    world = [{"CidrIp": "0.0.0.0/0"}]
    opened["provider"]["security_group"]["IpPermissions"] = [
        {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": world}
    ]
    assert (8265, 8265) in set(rules_open_to_the_world(opened)), "the check would see it"


SECRETS = r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:password|secret|token)\s*[:=]\s*['\"]?[A-Za-z0-9+/_-]{12,}"


def test_no_file_of_a_cluster_holds_a_secret():
    paths = [ROOT / "cluster.yaml", *(path for path in (ROOT / "clusters").iterdir() if path.is_file())]
    for path in paths:
        assert not re.search(SECRETS, path.read_text()), path
    for leak in ("aws_access_key_id: AKIAIOSFODNN7EXAMPLE", "password: hunter2hunter2", 'TOKEN="0123456789abcdef"'):
        assert re.search(SECRETS, leak), "the check would see it"
    ignored = subprocess.run(["git", "check-ignore", ".ray-token"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.returncode == 0, "the token stays out of git"


def test_versions_are_those_of_the_lock():
    versions = lock()
    documents = list(yaml.safe_load_all((ROOT / "clusters/kuberay.yaml").read_text()))
    assert [document["kind"] for document in documents] == [
        "ConfigMap", "RayCluster", "PersistentVolumeClaim", "NetworkPolicy", "RayJob",
    ]  # fmt: skip
    assert documents[1]["spec"]["rayVersion"] == versions["ray"]
    for name in FILES:
        assert read(name)["setup_commands"][0] == "cd ~/alexnet && make setup", "the lock is what nodes install"
        for found in re.findall(r"(ray|torch|mlflow)==([\d.]+)", (ROOT / name).read_text()):
            assert versions[found[0]] == found[1]
    for name in ("clusters/kuberay.yaml", "clusters/Dockerfile"):
        images = re.findall(r"alexnet-orchestrator:([\w.]+)", (ROOT / name).read_text())
        assert set(images) == {alexnet.__version__}, name


def test_the_aws_cluster_starts_from_nothing_and_its_gpu_nodes_hold_pairs():
    config = read("cluster.yaml")
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert all(kind["min_workers"] == 0 for kind in types.values())
    assert types["gpu"]["resources"]["GPU"] >= 2
    for name in ("gpu", "cpu"):
        assert types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    table, cluster = list(yaml.safe_load_all((ROOT / "clusters/kuberay.yaml").read_text()))[:2]
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "alexnet"}
    groups = cluster["spec"]["workerGroupSpecs"]
    assert {group["groupName"]: group["minReplicas"] for group in groups} == {"gpu": 0, "cpu": 0}
    types = yaml.safe_load(table["data"]["nodes.yaml"])["available_node_types"]
    for group in groups:
        said = types[group["groupName"]]
        asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        assert said["resources"]["CPU"] == int(asked["cpu"])
        assert said["resources"].get("GPU", 0) == int(asked.get("nvidia.com/gpu", 0))
        assert said["max_workers"] == group["maxReplicas"]
        assert group["rayStartParams"]["labels"] == f"usd-per-hour={said['labels']['usd-per-hour']}"


def test_the_price_table_is_read_from_the_yaml():
    types = node_types(ROOT / "cluster.yaml")
    assert [(kind.name, kind.cpus, kind.gpus, kind.at_most) for kind in types] == [
        ("cpu", 16, 0, 4), ("gpu", 48, 4, 4),
    ]  # fmt: skip
    assert all(kind.usd_per_hour for kind in types)
    assert node_types(ROOT / "clusters/onprem.yaml") == [], "its machines are there for good"
    assert node_types(ROOT / "nowhere.yaml") == []


@pytest.mark.parametrize("content", [b"", b"- a list", b"text", b"a: [", b"\xff\xfe"])
def test_a_broken_yaml_on_the_head_starts_no_nodes(content, tmp_path):
    (tmp_path / "bootstrap.yaml").write_bytes(content)
    assert read_bootstrap(tmp_path / "bootstrap.yaml") == {}
    assert node_types(tmp_path / "bootstrap.yaml") == []


def bomb(depth=30):
    """Ten times ten times ten values, in a few lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, depth)]
    return "\n".join(lines)


REFUSED = {
    "bomb": (bomb(), "line 5: more than 100000 values, its aliases written out"),
    "brackets": ("provider: " + "[" * 3000, "line 1: nested more than 50 deep"),
    "loop": ("provider: &a [1, *a]", "line 1: alias 'a': stands within what it stands for"),
    "tag": ("provider: !!python/object/apply:os.system [ls]", "not YAML: line 1: could not determine a constructor"),
    "date": ("provider: 2026-99-99", "not YAML: month must be in 1..12"),
    "control": ("provider: \x07", "not YAML: unacceptable character"),
    "large": ("# " + "x" * 100_000, "more than 100000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_yaml_of_a_cluster_is_refused_in_one_line_and_at_once(name, tmp_path, caplog):
    text, words = REFUSED[name]
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        Head.of(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert node_types(path) == []
    assert words in caplog.text
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"provider": []}, "provider: Input should be a valid dictionary"),
        ({"available_node_types": {"gpu": "large"}}, "available_node_types.gpu: "),
        ({"available_node_types": {"gpu": {"max_workers": -1}}}, "available_node_types.gpu.max_workers: "),
        ({"available_node_types": {"gpu": {"resources": {"GPU": "many"}}}}, "available_node_types.gpu.resources.GPU: "),
        ({"available_node_types": {"gpu": {"labels": {"usd-per-hour": "dear"}}}}, "available_node_types.gpu.labels: "),
    ],
)
def test_a_yaml_on_the_head_of_other_kinds_of_values_is_named_and_starts_no_nodes(changes, words, tmp_path, caplog):
    (tmp_path / "bootstrap.yaml").write_text(json.dumps({"provider": {"type": "aws"}} | changes))
    assert node_types(tmp_path / "bootstrap.yaml") == []
    assert words in caplog.text


def test_aliases_of_a_yaml_that_people_write_are_followed():
    kinds = read_bootstrap(ROOT / "cluster.yaml")["available_node_types"]
    assert kinds == read("cluster.yaml")["available_node_types"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"workers": 2, "layout": "columns"}, ("gpu", 1, 1)),
        ({"workers": 8, "layout": "columns"}, ("gpu", 2, 1)),
        ({"workers": 2, "device": "cpu"}, ("cpu", 1, 1)),
        ({"workers": 20, "device": "cpu"}, ("cpu", 2, 1)),
        ({"workers": 17, "layout": "data"}, None),  # sixteen GPUs are all that there can be
    ],
)
def test_which_nodes_a_run_would_start(settings, expected):
    found = would_start(make_config(**settings), node_types(ROOT / "cluster.yaml"))
    assert (found and (found[0].name, *found[1:])) == expected


def test_which_nodes_a_search_would_start():
    types, trial = node_types(ROOT / "cluster.yaml"), make_config(workers=2, layout="columns")
    assert would_start(trial, types, 4)[1:] == (2, 4)
    assert would_start(trial, types, 100)[1:] == (4, 8), "no more than the cluster can grow to"
    assert would_start(trial, types, None)[1:] == (4, 8)


def node(price=None, alive=True):
    return {"Alive": alive, "Labels": {} if price is None else {"usd-per-hour": price}}


def test_what_a_run_has_cost_follows_the_nodes_that_live(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("orchestrator.cluster.prices.time.monotonic", lambda: now[0])
    assert usd_per_hour([node("3.5"), node("0.5"), node("9", alive=False), node()]) == 4.0
    assert usd_per_hour([node()]) is None
    meter = Meter(usd=1.0)
    now[0] += 1800
    assert meter.read([node("4.0")]) == pytest.approx(3.0)
    now[0] += 900
    assert meter.read([node("4.0"), node("4.0")]) == pytest.approx(5.0)
    assert Meter().read([node()]) is None
    assert str(NodeType("gpu", 48, 4, 4, 3.9)) == "gpu (48 CPUs, 4 GPUs, $3.9 per hour each)"
