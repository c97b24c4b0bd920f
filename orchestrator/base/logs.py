"""Logging of a job."""

import logging


def set_up(verbose: bool) -> None:
    """What the terminal shows of the log: with `verbose` everything, else warnings."""
    logging.getLogger("orchestrator").setLevel(logging.DEBUG if verbose else logging.WARNING)
