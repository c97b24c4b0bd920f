"""The attempts of a fit: how many have failed of those that --max-failures allows, and why."""

from orchestrator.train.messages import Raised


class Attempts:
    """Told when the workers have started and what they raise."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.failed = allowed, 0
        self._started = False
        self._raised: set[int] = set()  # ranks that have raised an exception in the last attempt

    def started(self) -> bool:
        """Whether these workers replace some that were lost: the attempt before ended without an exception."""
        lost = self._started and not self._raised
        self.failed += lost
        self._started, self._raised = True, set()
        return lost

    def raised(self, event: Raised) -> str | None:
        """A line for the user; None for what was said already, and for the last attempt, whose error is the run's."""
        if event.rank in self._raised:  # of another attempt, which failed before its workers were at work
            self._raised = set()
        is_new = not self._raised
        self._raised.add(event.rank)
        self.failed += is_new
        if not is_new or self.failed >= self.allowed:
            return None
        why = f"worker {event.rank}: {event.text}"
        return f"attempt {self.failed} of {self.allowed} failed: {why}; resuming from the last checkpoint"

    def of_the_last(self, error: str) -> str:
        """The error of a fit, with the number of attempts where there were several."""
        return f"{error} (attempt {self.failed} of {self.allowed})" if 1 < self.failed <= self.allowed else error
