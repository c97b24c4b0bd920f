"""Feed damaged files to whatever reads files of others: `make fuzz MINUTES=60`.

    python tests/fuzz/fuzz.py --minutes 60 [--only FORMAT ...] [--seed N] [--folder DIR]
    python tests/fuzz/fuzz.py --replay FILE --only FORMAT

Each input must end in a result, or in one line of an error that is meant for the user, within SECONDS of CPU and
MEMORY_MB, without a file written elsewhere, a program started or a connection made; and the process must not grow.
Inputs are read in a child process, so that a crash and a hang are found, too. What breaks a rule is saved in DIR, once
for each place that it happened in, with the command that replays it; the exit status is then 1.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20  # of CPU for an input, its children included
HANG_CPU_S, HANG_S = 90, 1800  # of CPU, and by the clock: without an answer, or before the first
MEMORY_MB = 2048  # more than before the input
GROWTH_MB = 256  # of the process, after every format has had its first turn
TURN_CPU_S, TURN_S = 4.0, 30.0  # of a format, whichever is over first
POOL = 200  # inputs of a format that are damaged further: those that ended as none before
LONGEST = 1500  # characters of an error
USERS = ("ValueError", "NotAnImage", "JobError", "StorageError", "DamagedData", "Refused")  # what may be raised
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.bind")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


class Escaped(BaseException):
    """The reader of an input did what no reader may do. No Exception, so that nothing takes it for a damaged file."""


class Guard:
    """Sees what the process opens, while it is on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on = os.path.realpath(folder), False
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: Any) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            raise Escaped(f"{event} {arguments!r:.200}")
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if mode is None else set(mode) & set("wax+")
            if not writes or isinstance(path, int):
                return
            paths = [path]
        elif event in CHANGES:
            paths = [each for each in arguments[:2] if isinstance(each, str | bytes | os.PathLike)]
            if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # in an open folder
                paths = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(paths[0]))]
        else:
            return
        for path in paths:
            found = os.path.realpath(os.fsdecode(path))
            if not found.startswith(self.folder + "/") and found != os.devnull:
                raise Escaped(f"{event} of {found}")


class Reader:
    """Reads inputs in this process, and says what became of each."""

    def __init__(self, folder: Path) -> None:
        """folder: where inputs may write; its content is removed."""
        sys.dont_write_bytecode = True
        self.input, temporary = folder / "input", folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(temporary)
        from targets import TARGETS, fork_the_sandbox, use_no_ray

        fork_the_sandbox()
        use_no_ray()
        self.targets, self.guard = TARGETS, Guard(folder)

    def check_seeds(self, formats: list[str]) -> dict[str, list[bytes]]:
        """The sound inputs; each must be read as what it is, or nothing would be fuzzed."""
        found = {}
        for form in formats:
            found[form] = self.targets[form].seeds()
            for data in found[form]:
                self._empty()
                self.targets[form].read(data, self.input)
        return found

    def read(self, form: str, data: bytes) -> dict[str, Any]:
        """outcome, message, fault (or None), trace of a fault, CPU seconds and megabytes of an input."""
        self._empty()
        _reset_peak()
        before, began = _memory_mb("VmRSS"), _cpu_s()
        error: BaseException | None = None
        trace = ""
        self.guard.on = True
        try:
            self.targets[form].read(data, self.input)
        except (Exception, Escaped) as raised:
            error = raised
        finally:
            self.guard.on = False
        cpu_s, peak_mb = _cpu_s() - began, _memory_mb("VmHWM") - before
        fault = _fault(error)
        if fault is None and cpu_s > SECONDS:
            fault = f"took {cpu_s:.0f} s"
        if fault is None and peak_mb > MEMORY_MB:
            fault = f"took {peak_mb} MB"
        if fault and error is not None:
            trace = "".join(traceback.format_exception(error))
        outcome, message = (type(error).__name__, str(error)) if error is not None else ("read", "")
        return {
            "outcome": outcome,
            "message": message[:LONGEST],
            "fault": fault,
            "trace": trace,
            "cpu_s": cpu_s,
            "mb": peak_mb,
        }

    def _empty(self) -> None:
        shutil.rmtree(self.input, ignore_errors=True)
        self.input.mkdir()


def _fault(error: BaseException | None) -> str | None:
    """What is wrong with how an input ended."""
    if error is None:
        return None
    name, text = type(error).__name__, str(error)
    if name not in USERS:
        return f"raised {name}"
    if "\n" in text or not text.strip() or len(text) > LONGEST:
        return "raised an error that is not one line"
    if any(words in text for words in ("not enough memory", "Escaped", "its reader failed", "its reader was ended")):
        return f"raised: {text[:100]}"
    return None


def _place(trace: str) -> str:
    """The last line of the project in a traceback, which tells faults apart."""
    found = re.findall(r'File "[^"]*/((?:orchestrator|alexnet)/[^"]+)", line (\d+)', trace)
    return ":".join(found[-1]) if found else ""


def _memory_mb(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) // 1024 if found else 0


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _cpu_s() -> float:
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # fmt: skip


def child(folder: Path, formats: list[str], seed: int) -> None:
    """Read inputs of every format in turns, and print a line of JSON for each."""
    from mutate import LONGEST as LARGEST

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rng = random.Random(seed)
    reader = Reader(folder / "work")
    pools = reader.check_seeds(formats)
    limit = (_memory_mb("VmData") + MEMORY_MB + GROWTH_MB) * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    known: dict[str, set[str]] = defaultdict(set)
    while True:
        for form in formats:
            until, until_cpu = time.monotonic() + TURN_S, _cpu_s() + TURN_CPU_S
            while time.monotonic() < until and _cpu_s() < until_cpu:
                pool = pools[form]
                data = reader.targets[form].damage(rng.choice(pool), pool, rng)[:LARGEST]
                (folder / "current").write_bytes(data)
                (folder / "current.format").write_text(form)
                found = reader.read(form, data)
                kind = found["outcome"] + re.sub(r"'[^']*'|\d+", "", found["message"])[:120]
                if kind not in known[form] and len(pool) < POOL and not found["fault"]:
                    known[form].add(kind)
                    pool.append(data)
                if found["fault"]:
                    (folder / "faulty").write_bytes(data)
                out.write(json.dumps({"format": form} | found) + "\n")
                out.flush()
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            out.write(json.dumps({"turn": form, "rss_mb": _memory_mb("VmRSS")}) + "\n")
            out.flush()


class Findings:
    """Inputs that broke a rule, one for each place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()

    def add(self, form: str, data: bytes, fault: str, trace: str) -> None:
        from mutate import name_of

        key = f"{form}: {re.sub('[0-9]+', 'N', fault)} {_place(trace)}"
        self.counts[key] += 1
        if self.counts[key] > 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{form}-{name_of(data)}"
        file.write_bytes(data)
        replay = f"{sys.executable} tests/fuzz/fuzz.py --only {form} --replay {file}"
        file.with_name(file.name + ".txt").write_text(f"{key}\n{fault}\n{replay}\n\n{trace}")
        print(f"FAULT  {form}: {fault}; {_place(trace)}\n       replay: {replay}", flush=True)


class Supervisor:
    """Runs children until the time is over, and keeps the count."""

    def __init__(self, folder: Path, formats: list[str], seed: int) -> None:
        self.folder, self.formats, self.seed = folder, formats, seed
        self.findings = Findings(folder / "findings")
        self.rows = {form: {"inputs": 0, "read": 0, "seconds": 0.0, "slowest": 0.0, "mb": 0} for form in formats}
        self.first_rss: int | None = None
        self.last_rss = 0

    def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        number = 0
        while time.monotonic() < until:
            self._watch(number, until)
            number += 1

    def _watch(self, number: int, until: float) -> None:
        """One child, to its end or the time's."""
        command = [sys.executable, __file__, "--child", "--folder", str(self.folder), "--seed", str(self.seed + number)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with open(self.folder / "child.log", "wb") as log:
            process = subprocess.Popen(
                [*command, "--only", *self.formats],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=self.folder,
            )
            turns, hung = 0, False
            (self.folder / "current").unlink(missing_ok=True)
            try:
                for line in _lines(process, until):
                    if line is None:
                        hung = True
                        break
                    turns += self._take(line, turns)
            finally:
                over = process.poll() is None and not hung
                process.kill()
                status = process.wait()
        if over or time.monotonic() > until:
            return
        if not (self.folder / "current").exists():
            raise RuntimeError(
                f"the child ended before its first input: {(self.folder / 'child.log').read_text()[-2000:]}"
            )
        what = "hung" if hung else f"ended the process: {_named(status)}"
        trace = (self.folder / "child.log").read_text(errors="replace")[-3000:]
        self.findings.add(
            (self.folder / "current.format").read_text(), (self.folder / "current").read_bytes(), what, trace
        )

    def _take(self, line: str, turns: int) -> int:
        """Count what a child says. Returns 1 for a turn's end."""
        found = json.loads(line)
        if "turn" in found:
            self.last_rss = found["rss_mb"]
            if turns == len(self.formats):
                self.first_rss = self.last_rss
            if turns > len(self.formats) and self.first_rss and self.last_rss > self.first_rss + GROWTH_MB:
                self.findings.add(found["turn"], b"", f"grew from {self.first_rss} to {self.last_rss} MB", "")
            return 1
        row = self.rows[found["format"]]
        row["inputs"] += 1
        row["read"] += found["outcome"] == "read"
        row["seconds"] += found["cpu_s"]
        row["slowest"] = max(row["slowest"], found["cpu_s"])
        row["mb"] = max(row["mb"], found["mb"])
        if found["fault"]:
            self.findings.add(found["format"], (self.folder / "faulty").read_bytes(), found["fault"], found["trace"])
        return 0

    def report(self) -> str:
        lines = [f"{'format':15}{'inputs':>9}{'read':>8}{'CPU s':>8}{'slowest s':>11}{'most MB':>9}"]
        for form, row in self.rows.items():
            lines.append(
                f"{form:15}{row['inputs']:9d}{row['read']:8d}{row['seconds']:8.0f}{row['slowest']:11.2f}{row['mb']:9d}"
            )
        total = sum(row["inputs"] for row in self.rows.values())
        lines.append(
            f"{total} inputs; the process took {self.first_rss or self.last_rss} MB after the first round, and "
            f"{self.last_rss} MB at last"
        )
        lines += [f"{count} x {key}" for key, count in self.findings.counts.most_common()]
        return "\n".join([*lines, f"faults: {len(self.findings.counts)}"])


def _lines(process: Any, until: float) -> Iterator[str | None]:
    """Lines of a child; None if it has been silent for too long. Ends with the child, or when the time is over."""
    rest = b""
    heard, cpu_s = time.monotonic(), _tree_cpu_s(process.pid)
    while (left := until - time.monotonic()) > 0:
        ready, _, _ = select.select([process.stdout], [], [], min(left, 5))
        if ready:
            data = os.read(process.stdout.fileno(), 2**20)
            if not data:
                process.wait()
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode() for line in whole)
            heard, cpu_s = time.monotonic(), _tree_cpu_s(process.pid)
        elif time.monotonic() - heard > HANG_S or _tree_cpu_s(process.pid) - cpu_s > HANG_CPU_S:
            yield None
            return


def _tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all that it has started."""
    found = 0.0
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                found += sum(process.cpu_times()[:4])
    return found


def _named(status: int) -> str:
    import signal

    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def replay(folder: Path, form: str, file: Path) -> int:
    reader = Reader(folder / "work")
    reader.check_seeds([form])
    found = reader.read(form, file.read_bytes())
    print(found.pop("trace"))
    print(json.dumps(found, indent=1))
    return 1 if found["fault"] else 0


def main() -> int:
    sys.path.insert(0, str(ROOT))
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--minutes", type=float, default=60.0)
    flags.add_argument("--only", nargs="+", metavar="FORMAT", help="some of the formats (default: all)")
    flags.add_argument("--seed", type=int, help="of the inputs (default: another one each time)")
    flags.add_argument("--folder", type=Path, help="for inputs and findings (default: a new temporary folder)")
    flags.add_argument(
        "--replay", type=Path, metavar="FILE", help="read this input of the one FORMAT, and say what came of it"
    )
    flags.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.replay:
        return replay(folder, args.only[0], args.replay)
    if args.child:
        child(folder, args.only, args.seed)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**9)
    if args.only is None:
        from targets import TARGETS

        args.only = list(TARGETS)
    print(f"seed {seed}, in {folder}", flush=True)
    supervisor = Supervisor(folder, args.only, seed)
    with contextlib.suppress(KeyboardInterrupt):
        supervisor.run(60 * args.minutes)
    print(supervisor.report())
    return 1 if supervisor.findings.counts else 0


if __name__ == "__main__":
    sys.exit(main())
