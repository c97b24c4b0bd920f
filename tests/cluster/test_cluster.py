"""A cluster of several hosts, started and used as docs/cluster.md says: `ray up`, `ray job submit`, `make ui`.

The hosts are namespaces on this machine (hosts.py): a head, two workers, and the laptop of a user, who has the
token. Each has its own address, processes, /tmp and home; they share the disk, of which one folder is their NFS.
"""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse

import psutil
import pytest
import yaml
from conftest import ROOT
from hosts import Host, Network, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=f"no hosts: {REASON}"),
]
YAML = "cluster.yaml"


class Cluster:
    """The hosts, the user's project, and what the user types."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head, self.workers = network.add("head"), [network.add("worker1"), network.add("worker2")]
        self.laptop = network.add("laptop")
        self.shared = network.folder / "shared"
        self.shared.mkdir()
        self.project = network.folder / "laptop/home/user/project"
        _copy_project(self.project)
        self.workers[0].mount("-t tmpfs -o size=1g,mode=1777 tmpfs /tmp")  # a disk that can be filled
        for host in (self.head, *self.workers):
            host.serve_ssh()
            lend_environment(host, host.home / "alexnet")
        lend_environment(self.laptop, self.laptop.home / "project")
        self._edit_the_yaml()

    def _edit_the_yaml(self) -> None:
        """The three edits of a user."""
        text = (self.project / "clusters/onprem.yaml").read_text()
        for old, new in {
            "192.168.1.10 ": f"{self.head.address} ",
            "[192.168.1.11, 192.168.1.12]": "[" + ", ".join(worker.address for worker in self.workers) + "]",
            "ssh_user: alexnet": "ssh_user: root",
            "~/.ssh/id_ed25519": str(self.network.key),
            "/mnt/shared/alexnet": str(self.shared),
        }.items():
            assert old in text, old
            text = text.replace(old, new)
        (self.project / YAML).write_text(text)

    def types(self, command: str, timeout: float = 400, check: bool = True, **env: str):
        """What the user types, in the project's folder on the laptop."""
        here = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.laptop.home / "project/.ray-token"),
                "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}  # fmt: skip
        line = f". .venv/bin/activate && {command}"
        return self.laptop.run(line, self.laptop.home / "project", timeout, check, **(here | env))

    def submits(self, command: str, timeout: float = 400, check: bool = True):
        return self.types(f"ray job submit -- {command}", timeout, check)

    def starts(self, command: str) -> "Job":
        return Job(self, command)

    def on_head(self, command: str, check: bool = True):
        """As one who has logged in there."""
        return self.head.run(f". clusters/environment && {command}", self.head.home / "alexnet", check=check)

    def rejoin(self, host: Host) -> None:
        """What `ray up` would do there."""
        command = yaml.safe_load((self.project / YAML).read_text())["worker_start_ray_commands"][-1]
        host.run(f"export RAY_HEAD_IP={self.head.address} && {command} > /dev/null 2>&1")
        self.settle(2)

    def settle(self, workers: int = 2, within_s: float = 240) -> None:
        """Wait until so many workers have joined, and nothing else."""
        deadline = time.monotonic() + within_s
        count = "import ray, json; ray.init(log_to_driver=False, logging_level=50); "
        count += "print('nodes', sum(n['Alive'] and n['Resources'].get('CPU', 0) > 0 for n in ray.nodes()))"
        while time.monotonic() < deadline:
            done = self.on_head(f'RAY_ADDRESS=auto python -c "{count}"', check=False)
            if f"nodes {workers}\n" in done.stdout:
                return
            time.sleep(3)
        raise AssertionError(f"{workers} workers did not join: {done.stdout} {done.stderr}")

    def tracked(self, path: str, **query: str):
        """What the tracking server answers to its user, by way of the tunnel."""
        settings = dict(
            line.split("=", 1) for line in self.head.run("cat alexnet-tracking/client.env").stdout.splitlines()
        )
        user = f"{settings['MLFLOW_TRACKING_USERNAME']}:{settings['MLFLOW_TRACKING_PASSWORD']}"
        address = f"http://127.0.0.1:5000/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}"
        return json.loads(self.laptop.run(f"curl -s -u '{user}' '{address}'").stdout)

    def result(self, name: str):
        return json.loads((self.shared / "runs" / name / "result.json").read_text())

    def run_of(self, name: str):
        run = self.tracked("runs/get", run_id=self.result(name)["mlflow_run_id"])["run"]
        return run["info"]["status"], {tag["key"]: tag["value"] for tag in run["data"]["tags"]}

    def metrics_of(self, name: str, metric: str):
        run_id = self.result(name)["mlflow_run_id"]
        found = self.tracked("metrics/get-history", run_id=run_id, metric_key=metric).get("metrics", [])
        return {int(point["step"]): float(point["value"]) for point in found}

    def wait_for_epoch(self, name: str, epoch: int, within_s: float = 240) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            path = self.shared / "runs" / name / "result.json"
            if path.exists() and len(json.loads(path.read_text()).get("history", [])) >= epoch:
                return
            time.sleep(0.2)
        raise AssertionError(f"epoch {epoch} of {name} never came")


class Job:
    """A job that has been submitted, and the terminal that did it closed."""

    def __init__(self, cluster: Cluster, command: str) -> None:
        self.cluster = cluster
        done = cluster.types(f"ray job submit --no-wait -- {command}")
        self.id = re.search(r"raysubmit_\w+", done.stdout + done.stderr)[0]

    def status(self) -> str:
        done = self.cluster.types(f"ray job status {self.id}")
        said = re.search(rf"{self.id}'?:? (pending|running|succeeded|failed|stopped|was stopped)", done.stdout, re.I)
        assert said, done.stdout + done.stderr
        return said[1].split()[-1].upper()

    def log(self) -> str:
        return self.cluster.types(f"ray job logs {self.id}").stdout

    def wait(self, within_s: float = 400) -> str:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            status = self.status()
            if status in ("SUCCEEDED", "FAILED", "STOPPED"):
                return status
            time.sleep(2)
        raise AssertionError(f"{self.id} is still {status}: {self.log()}")


def _copy_project(target) -> None:
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)  # fmt: skip
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert names, "the tests of a cluster need a checkout"
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def lend_environment(host: Host, project) -> None:
    """`make setup` would fetch gigabytes for each host: they use this machine's, and setup finds nothing to do."""
    place = f"{project}/.venv"
    host.run(f"mkdir -p {place} && mount --bind {ROOT}/.venv {place} && mount -o remount,ro,bind {place}")


@pytest.fixture(scope="module")
def outside():
    """The processes of this machine before there was a cluster, in its own namespace."""
    return {process.pid: (process.create_time(), b" ".join(_command(process.pid))) for process in psutil.process_iter()}


@pytest.fixture(scope="module")
def cluster(outside):
    subprocess.run(["make", "--quiet", "setup"], cwd=ROOT, check=True)  # else every host would make its own
    with Network() as network:
        cluster = Cluster(network)
        cluster.laptop.run("make setup token", cluster.laptop.home / "project")
        begun = time.monotonic()
        cluster.up = cluster.types(f"ray up -y {YAML}", check=False)  # as the README has it
        print(f"\nray up: exit status {cluster.up.returncode} after {time.monotonic() - begun:.0f} s")
        assert cluster.up.returncode == 0, cluster.up.stdout[-3000:] + cluster.up.stderr[-3000:]
        cluster.settle()
        print(f"all nodes: after {time.monotonic() - begun:.0f} s")
        tunnels = cluster.laptop.start(". .venv/bin/activate && make ui",
                                       cluster.laptop.home / "project")  # fmt: skip
        lines = []
        while not any("Ctrl-C" in line for line in lines):
            lines.append(tunnels.stdout.readline())
            assert lines[-1], "".join(lines)
        cluster.ui = "".join(lines)
        yield cluster


def test_secrets_are_for_their_owner_alone_and_in_no_log(cluster):
    assert "http://127.0.0.1:5000" in cluster.ui
    password = cluster.head.run("grep PASSWORD alexnet-tracking/client.env").stdout.strip().split("=", 1)[1]
    token = (cluster.project / ".ray-token").read_text().strip()
    assert len(token) == 64
    for host, paths in {
        cluster.head: "alexnet/.ray-token alexnet-tracking alexnet-tracking/client.env alexnet-tracking/auth.ini",
        cluster.workers[0]: "alexnet/.ray-token",
    }.items():
        modes = host.run(f"stat -c %a {paths}").stdout.split()
        assert set(modes) <= {"600", "700"}, (host.name, modes)
    for secret in (password, token):
        assert secret not in cluster.up.stdout + cluster.up.stderr + cluster.ui
    _no_secret_anywhere(cluster)


def _no_secret_anywhere(cluster) -> None:
    """In no log and on no command line of a host that lives."""
    password = cluster.head.run("grep PASSWORD alexnet-tracking/client.env").stdout.strip().split("=", 1)[1]
    token = (cluster.project / ".ray-token").read_text().strip()
    for host in (host for host in (cluster.head, *cluster.workers) if host.process.poll() is None):
        for name, secret in {"password": password, "token": token}.items():
            # not on a command line, where it would find itself
            pattern = cluster.network.folder / "pattern"
            pattern.write_text(secret)
            found = host.run(f"grep -rlsF -f {pattern} /tmp alexnet-tracking/server.log", check=False).stdout
            assert found == "", f"the {name} is in {found} of {host.name}"
            commands = host.run(f"ps axww -o args | grep -F -f {pattern}", check=False).stdout
            assert commands == "", f"the {name} is on a command line of {host.name}"


def test_who_has_no_token_or_password_is_refused(cluster):
    """From the laptop, through the tunnels; a table of what each got."""
    token = (cluster.project / ".ray-token").read_text().strip()
    password = cluster.head.run("grep PASSWORD alexnet-tracking/client.env").stdout.strip().split("=", 1)[1]
    job = "-X POST -H 'Content-Type: application/json' -d '{\"entrypoint\": \"true\"}' http://127.0.0.1:8265/api/jobs/"
    experiments = "http://127.0.0.1:5000/api/2.0/mlflow/experiments"
    asked = {
        "submit a job": (job, "Authorization: Bearer {}", token, "0" * 64),
        "read the dashboard": ("http://127.0.0.1:8265/nodes?view=summary", "Authorization: Bearer {}", token, "0" * 64),
        "open MLflow's page": ("http://127.0.0.1:5000/", "user", password, "no"),
        "read MLflow": (f"{experiments}/search?max_results=1", "user", password, "no"),
        "write to MLflow": (
            f"-X POST -H 'Content-Type: application/json' -d '{{\"name\": \"probe\"}}' {experiments}/create",
            "user", password, "no",
        ),
    }  # fmt: skip
    print(f"\n{'':20} none  wrong  right")
    for what, (url, how, right, wrong) in asked.items():
        got = []
        for secret in (None, wrong, right):
            if secret is None:
                who = ""
            elif how == "user":
                who = f"-u alexnet:{secret}"
            else:
                who = f"-H '{how.format(secret)}'"
            got.append(cluster.laptop.run(f"curl -s -o /dev/null -w '%{{http_code}}' {who} {url}").stdout)
        print(f"{what:20} {got[0]:5} {got[1]:6} {got[2]}")
        assert got[0] in ("401", "403"), what
        assert got[1] in ("401", "403"), what
        assert got[2] == "200", what
    for how, env in {
        "no token": {"RAY_AUTH_TOKEN_PATH": "/nowhere"},
        "a wrong one": {"RAY_AUTH_TOKEN": "0" * 64},
    }.items():
        done = cluster.types("ray job submit -- true", check=False, **env)
        assert done.returncode != 0, how
    # nothing of the head but SSH, Ray's own ports (which want the token) and MLflow (a password) is open to the network
    open_ports = cluster.head.run("ss -Hltn").stdout
    assert not re.search(r"(0\.0\.0\.0|\*|\[::\]|10\.77\.0\.1):8265 ", open_ports), open_ports
    assert not re.search(r"(0\.0\.0\.0|\*|\[::\]):5000 ", open_ports), open_ports


def test_a_submitted_run_is_kept_where_all_see_it_and_tagged_with_its_job(cluster):
    done = cluster.submits("python jobs/train.py --epochs 3 --name first")
    assert "results after 3 epochs" in done.stdout
    result = cluster.result("first")
    assert result["checkpoint"] == str(cluster.shared / "runs/first/checkpoint-epoch-0003")
    status, tags = cluster.run_of("first")
    assert status == "FINISHED"
    assert re.fullmatch(r"raysubmit_\w+", tags["ray.job_id"])
    errors = {entry["step"]: entry["val/top1_error"] for entry in result["history"]}
    assert cluster.metrics_of("first", "val/top1_error") == errors
    for noise in ("Downloading artifacts", "View run", "core_worker"):
        assert noise not in done.stdout, noise


@pytest.mark.long
def test_a_search_runs_on_the_cluster(cluster):
    done = cluster.submits("python jobs/tune.py --num-samples 4 --epochs 2 --name search", timeout=600)
    assert "best of 4 trials" in done.stdout
    assert cluster.run_of("search")[0] == "FINISHED"
    assert len(cluster.result("search")["trials"]) == 4


@pytest.mark.long
def test_a_job_that_fails_or_is_stopped_says_so_in_its_status(cluster):
    job = cluster.starts("python jobs/train.py --output /tmp/runs --name private")
    assert job.wait() == "FAILED"
    error = [line for line in job.log().splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert re.search(r"--output /tmp/runs: node 10\.77\.0\.\d does not see this folder", error[0])

    job = cluster.starts("python jobs/train.py --epochs 500 --name stopped")
    cluster.wait_for_epoch("stopped", 2)
    second = cluster.starts("python jobs/train.py --resume stopped")
    assert second.wait() == "FAILED"
    assert f"--resume stopped: job {job.id} is working on it; wait for its end, or `ray job stop" in second.log()
    cluster.types(f"ray job stop {job.id}")
    assert job.wait() == "STOPPED"
    result = cluster.result("stopped")
    assert result["status"] == "KILLED"
    assert re.search(r"checkpoint-epoch-\d+(-step-\d+)?$", result["checkpoint"])
    assert cluster.run_of("stopped")[0] == "KILLED"
    done = cluster.submits(f"python jobs/train.py --resume stopped --epochs {len(result['history']) + 2}")
    assert "resumed after epoch" in done.stdout
    assert cluster.run_of("stopped")[0] == "FINISHED"


def test_the_doctor_finds_nothing_wrong_with_a_healthy_cluster(cluster):
    done = cluster.submits("python jobs/doctor.py")
    print(done.stdout)
    assert re.search(r"^\d+ ok, \d+ warn, 0 fail$", done.stdout, re.M)
    for check in ("versions", "token", "storage", "tracking", "network", "clock", "disk", "open files", "ports"):
        assert re.search(rf"^ok +{check} ", done.stdout, re.M), check


@pytest.mark.long
def test_two_columns_on_two_hosts_have_the_losses_of_one_host(cluster):
    for name, flags in {"one-host": "", "two-hosts": "--spread"}.items():
        cluster.submits(f"python jobs/train.py --epochs 3 --precision fp64 --name {name} {flags}", timeout=600)
    one, two = (cluster.result(name)["history"] for name in ("one-host", "two-hosts"))
    for a, b in zip(one, two, strict=True):
        for metric in ("train/loss", "val/loss", "val/top1_error"):
            assert a[metric] == pytest.approx(b[metric], rel=1e-12), metric
    print(f"\nloss after 3 epochs: one host {one[-1]['train/loss']!r}, two hosts {two[-1]['train/loss']!r}")


@pytest.mark.long
def test_a_tracking_server_that_is_gone_for_half_a_minute_loses_nothing(cluster):
    job = cluster.starts("python jobs/train.py --epochs 40 --name untracked")
    cluster.wait_for_epoch("untracked", 3)
    cluster.on_head("python jobs/tracking.py stop")
    time.sleep(30)
    cluster.on_head('python jobs/tracking.py start --host "$NODE_ADDRESS"')
    assert job.wait(600) == "SUCCEEDED", job.log()
    history = cluster.result("untracked")["history"]
    assert len(history) == 40
    for metric in ("train/loss", "val/loss", "val/top1_error", "train/images_per_s"):
        assert cluster.metrics_of("untracked", metric) == {entry["step"]: entry[metric] for entry in history}, metric
    assert cluster.run_of("untracked")[0] == "FINISHED"


@pytest.mark.long
def test_a_tracking_server_that_dies_is_started_again(cluster):
    cluster.head.run("pkill -9 -f mlflow.server.auth:create_app")
    deadline = time.monotonic() + 90
    while cluster.on_head('python jobs/tracking.py status --host "$NODE_ADDRESS"', check=False).returncode:
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.mark.long
def test_the_doctor_names_what_is_wrong_and_the_remedy(cluster):
    """Five broken clusters, one after the other, each mended again."""
    one, two = cluster.workers

    def says(check: str, words: str, remedy: str) -> None:
        done = cluster.submits("python jobs/doctor.py", check=False)
        assert done.returncode == 1
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"fail: {check}, ")]
        assert any(words in line for line in lines), done.stdout
        print(f"\n{next(line for line in lines if words in line)}")
        after = done.stdout[done.stdout.index(f"fail: {check}, ") :]
        assert f"remedy: {remedy}" in after, after
        print(f"  remedy: {remedy}...")

    cluster.on_head("python jobs/tracking.py stop")
    says("tracking", "cannot be reached", "`python jobs/tracking.py start")
    cluster.on_head('python jobs/tracking.py start --host "$NODE_ADDRESS"')

    one.run(f"mount --bind {cluster.shared} {cluster.shared} && mount -o remount,ro,bind {cluster.shared}")
    says("storage", "cannot be written", "mount it there")
    one.run(f"umount {cluster.shared}")

    one.run("head -c 1050000000 /dev/zero > /tmp/full || true")  # its /tmp, where Ray lives, is a disk of 1 GB
    says("disk", "/tmp/ray/session", "free some space")
    one.run("rm /tmp/full")

    # these two nodes do not come up again after `ray stop`, and the doctor asks them why, by SSH from the head
    version = next((ROOT / ".venv/lib").glob("python3*/site-packages/ray/_version.py"))
    other = cluster.network.folder / "_version.py"
    other.write_text(re.sub(r'version = ".*"', 'version = "2.59.0"', version.read_text()))
    places = (version, two.home / "alexnet" / version.relative_to(ROOT))  # the lent environment is seen in two places
    broken = {
        "it has Ray 2.59.0, here 2.60": (
            " && ".join(f"mount --bind {other} {place}" for place in places),
            " && ".join(f"umount {place}" for place in places),
        ),
        "it has another token": (
            "cp alexnet/.ray-token kept && echo 0000 > alexnet/.ray-token", "cp kept alexnet/.ray-token",
        ),
    }  # fmt: skip
    for words, (breaks, mends) in broken.items():
        two.run(breaks)
        two.run(f"pkill -9 raylet; {ROOT}/.venv/bin/ray stop --force", check=False)
        cluster.settle(1)
        says("nodes", words, "`ray up` again")
        two.run(mends)
        cluster.rejoin(two)


@pytest.mark.long
@pytest.mark.timeout(2400)  # the whole default search, on three hosts that share two cores
def test_every_command_of_the_readme_does_what_it_says(cluster):
    """Those of its section on clusters, but for those that the fixture and the last test type."""
    section = (ROOT / "README.md").read_text().split("## On a cluster")[1].split("\n## ")[0]
    commands = [line for block in section.split("```")[1::2] for line in block.strip().splitlines()]
    elsewhere = ["make setup token", f"ray up -y {YAML}", "make ui", f"ray down -y {YAML}"]
    assert [command for command in commands if command in elsewhere] == elsewhere
    shell = [command for command in commands if command not in elsewhere and not command.startswith("ray job")]
    for command in (command for command in commands if command.startswith("ray job")):
        line = " && ".join([*dict.fromkeys(shell), command])
        done = cluster.laptop.run(line, cluster.laptop.home / "project", timeout=1500)
        print(f"\n{command}: exit status {done.returncode}\n" + "\n".join(done.stdout.splitlines()[-6:]))


@pytest.mark.long
def test_a_run_survives_a_host_that_is_cut_off_and_one_that_dies(cluster):
    job = cluster.starts("python jobs/train.py --epochs 60 --name survivor")
    cluster.wait_for_epoch("survivor", 3)
    victim = _host_of_the_workers(cluster)
    victim.cut_off()
    time.sleep(60)
    before = len(cluster.result("survivor")["history"])
    cluster.wait_for_epoch("survivor", before + 2)
    victim.reconnect()
    print(f"\n{victim.name} was cut off for 60 s; epoch {before} then, and it went on")
    cluster.settle(2)

    victim = _host_of_the_workers(cluster)
    before = len(cluster.result("survivor")["history"])
    victim.kill()
    cluster.wait_for_epoch("survivor", before + 3)
    print(f"{victim.name} died after epoch {before}; the run is at {len(cluster.result('survivor')['history'])}")
    assert job.wait(600) == "SUCCEEDED", job.log()
    result = cluster.result("survivor")
    assert [entry["epoch"] for entry in result["history"]] == list(range(1, 61))
    assert "lost; resuming from the last checkpoint" in job.log()


def _host_of_the_workers(cluster) -> Host:
    """The one on which the training processes run now."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for host in cluster.workers:
            if host.process.poll() is None and "RayTrainWorker" in host.run("ps ax", check=False).stdout:
                return host
        time.sleep(0.5)
    raise AssertionError("no host has training workers")


def test_ray_down_ends_the_cluster_and_touches_nothing_outside(cluster, outside):
    """The last test: after it there is no cluster."""
    _no_secret_anywhere(cluster)  # with all that has been run since
    bystander = psutil.Popen(["bash", "-c", "exec -a ray::raylet/raylet sleep 600"])
    cluster.types(f"ray down -y {YAML}")
    deadline = time.monotonic() + 180  # the workers give up a head that does not come back
    for host in (cluster.head, *cluster.workers):
        while host.process.poll() is None and "raylet" in host.run("ps ax", check=False).stdout:
            assert time.monotonic() < deadline, f"{host.name} still runs Ray"
            time.sleep(1)
    alive = {process.pid: process.create_time() for process in psutil.process_iter()}
    ended = {pid: command for pid, (since, command) in outside.items() if alive.get(pid) != since}
    assert not [command for command in ended.values() if b"raylet" in command or b"gcs_server" in command]
    assert alive.get(bystander.pid), "a process that looks like Ray's, outside"
    bystander.kill()


def _command(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def test_hosts_leave_nothing_behind(tmp_path):
    with Network() as network:
        host = network.add("alone")
        host.run("touch /tmp/mine && (sleep 1000 > /dev/null 2>&1 &)")
        assert not os.path.exists("/tmp/mine")
        folder, pid = network.folder, host.pid
    assert not folder.exists()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
