"""Freed memory is kept for the next tensor, in whatever thread it is made."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from orchestrator.cli import start
from orchestrator.cluster.connection import RAY_ENV

PROGRAM = """
import resource, sys, threading
from alexnet import use_one_arena
if "one" in sys.argv and not use_one_arena():
    sys.exit(77)
import torch
from alexnet import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    faults()
    ready.wait()
    found.append((faults(), faults())[1])

found, ready = [], threading.Event()
thread = threading.Thread(target=work)
thread.start()
if "keep" in sys.argv and not keep_freed_memory():
    sys.exit(77)
ready.set()
thread.join()
print(*found)
"""


def page_faults(*arguments: str, **environment: str) -> int:
    """Of a thread that fills a tensor of 64 MB five times, after it has done so once before."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_tensors_take_no_new_pages_in_any_thread_of_a_process_that_began_with_one_arena() -> None:
    assert page_faults() > 10_000  # the test can fail
    assert page_faults("keep", MALLOC_ARENA_MAX="1") < 8_000  # some for the rest of the process


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_nor_in_one_that_called_for_one_arena_before_it_had_threads() -> None:
    assert page_faults("keep", "one") < 8_000  # some for the rest of the process


def test_commands_and_rays_processes_begin_so(monkeypatch) -> None:
    begun = []
    monkeypatch.setattr(start, "use_one_arena", lambda: begun.append("arena"))
    monkeypatch.setattr(start, "end_at_once_on_signals", lambda: None)
    monkeypatch.setattr(start, "end_without_teardown", lambda: begun.append)
    monkeypatch.setattr(start, "prepare_workers", lambda *modules: begun.append("fork server"))
    monkeypatch.setattr(
        start.importlib, "import_module", lambda name: begun.append(name) or SimpleNamespace(script=int)
    )
    assert start.train() == 0
    assert begun == ["arena", "fork server", "orchestrator.cli.train", 0]
    assert RAY_ENV["MALLOC_ARENA_MAX"] == "1"
