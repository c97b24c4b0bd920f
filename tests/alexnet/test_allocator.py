"""Freed memory is kept for the next tensor, in whatever thread it is made."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
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
faults()
print(*found, faults())
"""


def page_faults(*arguments: str, **environment: str) -> list[int]:
    """Of a thread and of the main one, that fill a tensor of 64 MB five times."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return [int(each) for each in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_tensors_take_no_new_pages_in_any_thread_of_a_process_that_began_with_one_arena() -> None:
    assert min(page_faults()) > 10_000  # the test can fail
    assert max(page_faults("keep", MALLOC_ARENA_MAX="1")) < 100
