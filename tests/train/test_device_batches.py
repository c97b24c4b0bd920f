"""Batches on the net's device: what arrives, and in which order copies and steps wait for each other."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from orchestrator.train import device_batches
from orchestrator.train.device_batches import CUT, copied_ahead, to_device

CPU = torch.device("cpu")


def make_batches(number, size=5):
    random = np.random.default_rng(0)
    return [
        {
            "image": random.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8),
            "top": random.integers(0, 9, size, dtype=np.int32), "left": random.integers(0, 9, size, dtype=np.int32),
            "flip": random.integers(0, 2, size).astype(bool), "label": random.integers(0, 10, size),
            "id": np.arange(size),
        }
        for _ in range(number)
    ]  # fmt: skip


def assert_holds(placed, batch):
    assert (placed.image.dtype, placed.cut.dtype) == (torch.uint8, torch.int32)
    assert np.array_equal(placed.image.numpy(), batch["image"])
    assert placed.cut.tolist() == np.stack([batch[name] for name in CUT], axis=1).tolist()


def test_pixels_and_how_they_were_cut_arrive_and_on_the_cpu_pixels_are_not_copied():
    [batch] = make_batches(1)
    placed = to_device(batch, CPU)
    assert_holds(placed, batch)
    assert placed.image.data_ptr() == batch["image"].ctypes.data
    assert_holds(placed.part(1, 3), {name: column[1:3] for name, column in batch.items()})
    empty = {name: column[:0] for name, column in batch.items()}
    assert_holds(to_device(empty, CPU), empty)


def test_colours_of_images_that_are_not_cut_yet_come_along():
    [batch] = make_batches(1)
    shift = np.arange(15, dtype=np.float32).reshape(5, 3)
    placed = to_device(batch | {"shift": shift}, CPU)
    assert np.array_equal(placed.shift.numpy(), shift)
    assert np.array_equal(placed.part(2, 4).shift.numpy(), shift[2:4])
    assert to_device(batch, CPU).part(2, 4).shift is None


def test_pixels_that_may_only_be_read_are_taken_without_a_warning():
    [batch] = make_batches(1)
    batch["image"].flags.writeable = False
    assert_holds(to_device(batch, CPU), batch)


def test_all_batches_come_in_order_and_none_is_asked_for_before_its_turn():
    batches, asked = make_batches(4), []

    def feed():
        for number, batch in enumerate(batches):
            asked.append(number)
            yield batch

    for number, placed in enumerate(copied_ahead(feed(), CPU)):
        assert asked == list(range(number + 1))
        assert_holds(placed, batches[number])
    assert number == 3


class Backend:
    """A device whose streams write down what is asked of them; tensors stay on the CPU."""

    def __init__(self):
        self.said, self.now, self.events = [], "steps", 0

    def Stream(self):  # noqa: N802  (as in torch.cuda)
        return self._stream("copies")

    def current_stream(self, device):
        return self._stream(self.now)

    def _stream(self, name):
        stream = type("Stream", (), {"name": name})()
        stream.wait_stream = lambda other: self.said.append(f"{name} wait for {other.name}")
        return stream

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before

    def Event(self):  # noqa: N802
        number, self.events = self.events, self.events + 1
        event = type("Event", (), {})()
        event.record = lambda stream: self.said.append(f"end of step {number} on {stream.name}")
        event.synchronize = lambda: self.said.append(f"the program waits for step {number}")
        return event


def test_a_step_waits_for_its_copy_and_the_program_for_the_step_before_the_last(monkeypatch):
    backend = Backend()
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    plain = to_device
    monkeypatch.setattr(
        device_batches, "to_device", lambda *given: (backend.said.append(f"copy on {backend.now}"), plain(*given))[1]
    )
    spans = []

    @contextmanager
    def span(name):
        spans.append(name)
        yield
        assert backend.said[-1] == "steps wait for copies"

    for number, _ in enumerate(copied_ahead(make_batches(3), CPU, span)):
        backend.said.append(f"step {number}")
    copy = ["copy on copies", "steps wait for copies"]
    assert backend.said == [
        *copy, "step 0", "end of step 0 on steps",
        *copy, "step 1", "end of step 1 on steps", "the program waits for step 0",
        *copy, "step 2", "end of step 2 on steps", "the program waits for step 1",
    ]  # fmt: skip
    assert spans == ["copy"] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")
def test_on_a_gpu_batches_are_whole_when_their_step_reads_them_however_late_that_is():
    """Steps of 50 ms: copies that did not wait, or memory that was used again, would show in the sums."""
    device, batches = torch.device("cuda", torch.cuda.current_device()), make_batches(12, size=2000)
    sums = []
    for placed in copied_ahead(iter(batches), device):
        assert placed.image.device == placed.cut.device == device
        torch.cuda._sleep(100_000_000)  # cycles
        sums.append((placed.image.long().sum(), placed.cut.long().sum(0)))
    for (pixels, cut), batch in zip(sums, batches, strict=True):
        assert pixels.item() == batch["image"].sum(dtype=np.int64)
        assert cut.tolist() == [batch[name].sum(dtype=np.int64) for name in CUT]
