"""Which checkpoints of a search's trials are kept."""

import re


def age_of_kept(name: str) -> tuple[int, int]:
    """Sorts what a trial has set aside: how often its weights had been replaced, and the epoch."""
    exploits = re.match(r"\d+-(\d+)-from", name)
    return int(exploits[1]) if exploits else 0, int(name.rpartition("-")[2])
