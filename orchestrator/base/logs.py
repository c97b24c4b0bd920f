"""Python's logging in this project's processes."""

import logging
from collections.abc import Callable

Send = Callable[[int, str, str, float], None]


def forward(send: Send) -> None:
    """From now on hand every line that this process logs to `send`: level, logger's name, text, seconds since epoch."""
    root = logging.getLogger()
    root.addHandler(_Forward(send))
    logging.getLogger("orchestrator").setLevel(logging.DEBUG)


class _Forward(logging.Handler):
    def __init__(self, send: Send) -> None:
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.send(record.levelno, record.name, self.format(record), record.created)
        except Exception:
            self.handleError(record)
