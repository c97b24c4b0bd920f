"""How news travels between the workers and the driver. Its process imports this file only, and starts at once."""

from collections import defaultdict
from typing import Any

SAVE, DROP = "save", "drop"


class Mailbox:
    """An actor with a box for every topic: it holds events until somebody fetches them, and a word to those who write
    them, the wish that they stop, until they write again."""

    def __init__(self) -> None:
        self.events: defaultdict[str, list[Any]] = defaultdict(list)
        self.stopping: dict[str, str] = {}

    def put(self, topic: str, event: Any) -> str | None:
        """Returns how the writers on this topic are asked to stop: SAVE or DROP what they have; None: not at all."""
        self.events[topic].append(event)
        return self.stopping.get(topic)

    def drain(self, topic: str) -> list[Any]:
        return self.events.pop(topic, [])

    def ask_to_stop(self, topic: str, how: str) -> None:
        self.stopping[topic] = how

    def is_stopping(self, topic: str) -> bool:
        return topic in self.stopping
