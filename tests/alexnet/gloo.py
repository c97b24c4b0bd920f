"""Several processes on this machine, connected by gloo: the second tier of tests, below whole jobs on Ray."""

import functools
import multiprocessing
import os
import socket
import struct
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from alexnet import augment, local_response_norm

TIMEOUT_S = 120
# what the processes import is most of their life: it is imported once, in a server that they are forked from
PRELOADED = ["torch.distributed", "numba", "alexnet", "alexnet.layouts", "orchestrator.train.checkpoints", "pytest"]


@functools.cache
def compile_kernels() -> None:
    """Have numba compile what training on a CPU needs, into its cache on disk, from which other processes load it.

    It takes 20 s and more in a fresh clone, which no timeout of a test should have to allow for.
    """
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a = torch.ones(1, 4, 1, 1, dtype=dtype, requires_grad=True)
        local_response_norm(a, relu=True).sum().backward()
    tiny = np.zeros((1, 8, 8, 3), np.uint8)
    augment.crop_flip_shift(tiny, augment.center(1, margin=0), np.zeros((1, 3), np.float32), 8)


def run_gloo(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call work(rank, *args) in world_size processes of one gloo group; returns what each returned."""
    compile_kernels()
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (world_size, folder, work, args), nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(world_size)]


def _enter(rank: int, world_size: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world_size), rank=rank, world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    try:
        torch.save(work(rank, *args), Path(folder, str(rank)))
        dist.barrier()
    except Exception:
        traceback.print_exc()
        os._exit(1)  # the others may wait in a collective: end now, and spawn ends them
    dist.destroy_process_group()


def bytes_sent() -> int:
    """Payload bytes that this process's TCP sockets have sent and the other side has acknowledged (Linux, TCP_INFO)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or no TCP socket
            continue
        if len(info) >= 136:
            total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return total
