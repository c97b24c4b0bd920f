"""Several hosts on one machine, each with its own network address, processes, /tmp, /run, /dev/shm and home.

A host is a set of Linux namespaces that share nothing with the machine's own but its disk. Their network is a bridge in
one more namespace: nothing leaves it, nothing comes in, and the machine's own network is not touched. Each host runs
sshd, so that one can be reached from another as a user reaches a server.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

NETWORK = "10.77.0"
KEPT = sorted({Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix)})  # outer folders first
NEEDED = {  # command: Debian's package
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
}
APART = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
INIT = """
import signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps orphans
while True: time.sleep(3600)
"""
SSHD = """
AuthorizedKeysFile {home}/.ssh/authorized_keys
HostKey {folder}/host_key
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
LogLevel ERROR
MaxStartups 100
"""


def why_not() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for name, package in NEEDED.items():
        if shutil.which(name) is None:
            return f"{name} is not installed (package {package})"
    bridge = ["ip", "link", "add", "name", "probe", "type", "bridge"]
    done = subprocess.run([*APART, *bridge], capture_output=True, text=True)
    return f"namespaces may not be made here: {done.stderr.strip()}" if done.returncode else None


class Host:
    """One of them. Its commands run as root, in its own home."""

    def __init__(self, network: "Network", name: str, number: int) -> None:
        self.network, self.name, self.number, self.address = network, name, number, f"{NETWORK}.{number}"
        self.folder = network.folder / name
        self.home = Path("/home/user")
        for part in ("tmp", "home/user/.ssh"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "tmp").chmod(0o1777)
        (self.folder / "home/user").chmod(0o700)
        # what unshare says when it is killed is of no use
        self.process = subprocess.Popen([*APART, sys.executable, "-c", INIT], stderr=subprocess.DEVNULL)
        network.hosts[name] = self  # to be ended with the others, whatever comes
        self.pid = _only_child(self.process.pid)
        self._join()
        passwd = self.folder / "passwd"
        passwd.write_text(f"root:x:0:0:root:{self.home}:/bin/bash\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n")
        self.run(f"hostname {name} && mount --bind {passwd} /etc/passwd", cwd="/")
        self.mount(f"--bind {self.folder}/home /home")
        self.mount(f"--bind {self.folder}/tmp /tmp")
        self.mount("-t tmpfs -o mode=755 tmpfs /run")
        self.mount("-t tmpfs -o size=3g,mode=1777 tmpfs /dev/shm")
        self.run("mkdir /run/sshd", cwd="/")

    def mount(self, what: str) -> None:
        """Mount over a folder. The project and its Python, if they are below it, stay where they are."""
        place = what.split()[-1]
        below = {path: self.folder / "kept" / path.relative_to("/") for path in KEPT if path.is_relative_to(place)}
        aside = [f"mkdir -p {kept} && mount --bind {path} {kept}" for path, kept in below.items()]
        back = [f"mkdir -p {path} && mount --bind {kept} {path}" for path, kept in below.items()]
        self.run(" && ".join([*aside, f"mount {what}", *back]), cwd="/")

    def _join(self) -> None:
        """Put a cable between this host and the bridge."""
        switch, cable = str(self.network.pid), f"h{self.number}"
        _do("nsenter", "-t", switch, "-n", "ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns",
            str(self.pid))  # fmt: skip
        _do("nsenter", "-t", switch, "-n", "ip", "link", "set", cable, "master", "bridge", "up")
        inside = ["nsenter", "-t", str(self.pid), "-n", "ip"]
        _do(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        _do(*inside, "link", "set", "eth0", "up")
        _do(*inside, "link", "set", "lo", "up")

    def command(self, text: str, cwd: str | Path | None = None, **env: str) -> list[str]:
        """What runs a shell command here, with an environment of its own."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        clean = {"HOME": str(self.home), "PATH": path, "LANG": "C.UTF-8", "TERM": "dumb"} | env
        settings = [f"{key}={value}" for key, value in clean.items()]
        line = f"cd {cwd or self.home} && {text}"
        return [
            "nsenter",
            "-t",
            str(self.pid),
            "-n",
            "-p",
            "-m",
            "-u",
            "-i",
            "env",
            "-i",
            *settings,
            "bash",
            "-c",
            line,
        ]

    def run(
        self, text: str, cwd: str | Path | None = None, timeout: float = 300, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(text, cwd, **env), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            raise AssertionError(f"{self.name}: {text}\nexit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, text: str, cwd: str | Path | None = None, **env: str) -> subprocess.Popen[str]:
        """In the background; both outputs in one pipe."""
        both = subprocess.PIPE
        return subprocess.Popen(
            self.command(text, cwd, **env), stdout=both, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
        )

    def serve_ssh(self) -> None:
        """Let in whoever has the network's key."""
        (self.folder / "sshd_config").write_text(SSHD.format(home=self.home, folder=self.folder))
        (self.folder / "home/user/.ssh/authorized_keys").write_text((self.network.key.with_suffix(".pub")).read_text())
        self.run(f"ssh-keygen -q -t ed25519 -N '' -f {self.folder}/host_key </dev/null; "
                 f"/usr/sbin/sshd -f {self.folder}/sshd_config", cwd="/")  # fmt: skip

    def cut_off(self) -> None:
        """Pull its cable."""
        _do("nsenter", "-t", str(self.network.pid), "-n", "ip", "link", "set", f"h{self.number}", "down")

    def reconnect(self) -> None:
        _do("nsenter", "-t", str(self.network.pid), "-n", "ip", "link", "set", f"h{self.number}", "up")

    def kill(self) -> None:
        """As a power cut: all its processes are gone at once."""
        _kill(self.process)


class Network:
    """The bridge and the hosts on it. Everything ends with the `with` block."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/var/tmp"))  # not in /tmp, of which each has its own
        self.hosts, self.key = dict[str, Host](), self.folder / "key"

    def __enter__(self) -> "Network":
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)
        new = ["unshare", "--net", "--pid", "--fork", "--kill-child", sys.executable, "-c", INIT]
        self.process = subprocess.Popen(new, stderr=subprocess.DEVNULL)
        self.pid = _only_child(self.process.pid)
        _do("nsenter", "-t", str(self.pid), "-n", "ip", "link", "add", "bridge", "type", "bridge")
        _do("nsenter", "-t", str(self.pid), "-n", "ip", "link", "set", "bridge", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for host in self.hosts.values():
            if host.process.poll() is None:
                host.kill()
        _kill(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str) -> Host:
        return Host(self, name, 1 + len(self.hosts))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """A namespace ends with its first process, the child of `unshare`."""
    for child in psutil.Process(process.pid).children():
        child.kill()
    process.kill()
    process.wait(10)


def _only_child(pid: int) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if found := psutil.Process(pid).children():
            return int(found[0].pid)
        time.sleep(0.02)
    raise AssertionError("the namespace did not come up")


def _do(*command: str) -> None:
    deadline = time.monotonic() + 5
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, f"{' '.join(command)}: {done.stderr}"
        time.sleep(0.05)  # the namespace may still be coming up
