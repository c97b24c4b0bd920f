"""A worker's side of the talk with the driver."""

from orchestrator.train.mailbox import DROP, SAVE

STOP_CODES = {SAVE: 1.0, DROP: 2.0}  # about stopping, as a number that travels with the losses; 0: nothing
