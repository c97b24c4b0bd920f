"""How news travels between the workers and the driver. Its process imports this file only, and starts at once."""

from typing import Any

Event = dict[str, Any]


class Mailbox:
    """An actor that holds events until the driver fetches them, and a word from the driver until the workers do."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stop = False

    def put(self, event: Event) -> bool:
        """Returns whether the workers are asked to stop."""
        self.events.append(event)
        return self.stop

    def drain(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def ask_to_stop(self) -> None:
        self.stop = True
