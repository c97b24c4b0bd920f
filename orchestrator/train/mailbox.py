"""How events reach the driver. The mailbox's process imports this file and messages.py only, and so starts at once."""

from collections import defaultdict

from orchestrator.train.messages import Event, TrialEvent

SAVE, DROP = "save", "drop"


class Mailbox:
    """An actor with a box for every topic.

    It holds events until the driver fetches them. A request to stop is returned to the senders when they next send.
    """

    def __init__(self) -> None:
        self.events: defaultdict[str, list[Event | TrialEvent]] = defaultdict(list)
        self.stopping: dict[str, str] = {}

    def put(self, topic: str, event: Event | TrialEvent) -> str | None:
        """Returns how the senders on this topic are asked to stop: SAVE or DROP their work; None: not at all."""
        self.events[topic].append(event)
        return self.stopping.get(topic)

    def drain(self, topic: str) -> list[Event | TrialEvent]:
        """The events since the last call, in order."""
        return self.events.pop(topic, [])

    def ask_to_stop(self, topic: str, how: str) -> None:
        """Ask all senders on this topic to stop: `how` is SAVE or DROP."""
        self.stopping[topic] = how

    def is_stopping(self, topic: str) -> bool:
        """Whether the senders on this topic were asked to stop."""
        return topic in self.stopping
