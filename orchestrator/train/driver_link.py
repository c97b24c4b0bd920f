"""A worker's side of the exchange with the driver: events and log lines to it, its request to stop from it."""

import contextlib
from typing import Any

import ray
import torch

from orchestrator.base.exits import name_and_line
from orchestrator.train.mailbox import DROP, SAVE
from orchestrator.train.messages import Event, Failed, Logged, Profiled, Raised
from orchestrator.train.step import all_reduce_sum

STOP_CODES = {SAVE: 1.0, DROP: 2.0}  # a stop request as a number, to be summed with the losses; 0: none
FLUSH_S = 10.0  # how long the end of a worker waits for its last lines to arrive


class DriverLink:
    """Sends without waiting. Nothing here depends on how fast the driver reads."""

    def __init__(self, mailbox: Any, topic: str, rank: int) -> None:
        self.mailbox, self.topic, self.rank = mailbox, topic, rank
        self._sent: Any = None  # the reply to the last event, which holds the stop request
        self._logged: Any = None  # the reply to the last log line, or to a part of a profile
        self._stop_code = 0.0

    def report_event(self, event: Event) -> None:
        """Send an event, from rank 0 alone, without waiting."""
        if self.rank == 0:
            self.poll_stop_request()  # before the last reply is replaced
            self._sent = self.mailbox.put.remote(self.topic, event)

    def report_failure(self, text: str) -> None:
        """Send `Failed`, from any rank, and wait until it has arrived: the other ranks may be about to be killed."""
        ray.get(self.mailbox.put.remote(self.topic, Failed(text=text)))

    def report_error(self, error: Exception) -> None:
        """Send `Raised`, from any rank, and wait for it, within FLUSH_S; never raises. A collective's error is not
        sent: the worker at its other end was lost, or tells why."""
        if is_of_a_collective(error):
            return
        with contextlib.suppress(Exception):
            sent = self.mailbox.put.remote(self.topic, Raised(rank=self.rank, text=name_and_line(error)))
            ray.wait([sent], timeout=FLUSH_S)

    def log(self, level: int, name: str, text: str, at: float) -> None:
        """Send a line of this process's log, from any rank, without waiting."""
        line = Logged(rank=self.rank, level=level, name=name, text=text, at=at)
        with contextlib.suppress(Exception):  # a line that cannot be sent must not break training
            self._logged = self.mailbox.put.remote(self.topic, line)

    def send_profile(self, part: Profiled) -> None:
        """Send it, from any rank, without waiting."""
        self._logged = self.mailbox.put.remote(self.topic, part)

    def flush(self) -> None:
        """Wait until the last event has arrived."""
        if self._sent is not None:
            ray.get(self._sent)

    def flush_log(self) -> None:
        """Wait for the last log line or part of a profile, within FLUSH_S; never raises."""
        if self._logged is not None:
            with contextlib.suppress(Exception):
                ray.wait([self._logged], timeout=FLUSH_S)

    def poll_stop_request(self) -> float:
        """The driver's stop request as one of STOP_CODES, from the reply to rank 0's last event.

        0 if there is none, and on all other ranks: the sum over the workers is the request.
        """
        if self._sent is not None and not self._stop_code and ray.wait([self._sent], timeout=0)[0]:
            self._stop_code = STOP_CODES.get(ray.get(self._sent), 0.0)
        return self._stop_code

    def all_reduce_stop(self, device: torch.device, world_size: int) -> float:
        """The driver's stop request, the same on all workers, which call this together."""
        request = torch.tensor([self.poll_stop_request()], device=device)
        all_reduce_sum(request, world_size)
        return float(request.item())


def is_of_a_collective(error: BaseException) -> bool:
    """Whether it is an exchange between workers that failed, which the one that raises it has not caused."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
