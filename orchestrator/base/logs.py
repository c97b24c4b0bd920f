"""Where log lines go."""

import logging


def set_up(verbose: bool) -> None:
    """What the terminal shows of the log: with `verbose` everything, else warnings."""
    logging.getLogger("orchestrator").setLevel(logging.DEBUG if verbose else logging.WARNING)


def keep_off_terminal(*names: str) -> None:
    """Take the terminal's handlers off these loggers. Files, and loggers above that write to files, still get their
    lines, whatever the level."""
    for name in names:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                logger.removeHandler(handler)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())  # without any, Python prints warnings itself
