"""A worker's batches on the device of its net: uint8 pixels and how they were cut, copied while the step before runs.

N images, H rows, W columns of pixels.
"""

import collections
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.reader import Batch
from orchestrator.train.profile import Spans, no_span

CUT = ("top", "left", "flip", "label")  # what is sent with an image's pixels


class DeviceBatch(NamedTuple):
    """Images of a step."""

    image: Tensor  # (N, H, W, 3) uint8
    cut: Tensor  # (N, 4) int32, the columns of CUT
    shift: Tensor | None = None  # (N, 3) float32, of the colours of images that are not cut yet

    def part(self, lo: int, hi: int) -> "DeviceBatch":
        """Some of the images, not copied."""
        shift = None if self.shift is None else self.shift[lo:hi]
        return DeviceBatch(self.image[lo:hi], self.cut[lo:hi], shift)


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copy a batch: to a GPU through memory that is pinned, from which the copy runs beside the program; on the CPU the
    pixels stay where they are."""
    cut = np.stack([batch[name] for name in CUT], axis=1, dtype=np.int32, casting="unsafe")
    host = [as_tensor(batch["image"]), torch.from_numpy(cut)]
    if "shift" in batch:
        host.append(as_tensor(batch["shift"]))
    if device.type == "cuda":
        host = [tensor.pin_memory() for tensor in host]
    return DeviceBatch(*(tensor.to(device, non_blocking=True) for tensor in host))


def copied_ahead(batches: Iterable[Batch], device: torch.device, span: Spans = no_span) -> Iterator[DeviceBatch]:
    """The batches on the device; each is copied on a stream of its own while the step before it still runs.

    A program may be many steps ahead of its GPU, and batches that were copied so early would fill its memory. So the
    next batch is copied when the step before the last one has ended: two are there at a time.
    """
    backend: Any = torch.get_device_module(device)  # of a CPU, streams and events that do nothing
    copies = backend.Stream(device) if device.type == "cuda" else backend.Stream()
    running = collections.deque[Any]()  # the end of each step that may still run
    for batch in batches:
        with span("copy"):
            with backend.stream(copies):
                copied = to_device(batch, device)
            steps = backend.current_stream(device)
            steps.wait_stream(copies)
            for tensor in copied:
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(steps)  # its memory is not used again before the step has read it
        yield copied
        del copied, batch
        end = backend.Event()
        end.record(backend.current_stream(device))
        running.append(end)
        if len(running) > 1:
            running.popleft().synchronize()


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor over the array's memory, which may be read-only: the caller does not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
