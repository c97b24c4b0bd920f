"""Weights that a run keeps for good: those of every N-th epoch, beside its best and its last checkpoint."""

from pathlib import Path

from alexnet.trained import WEIGHTS
from orchestrator.base.storage import StoragePath
from orchestrator.train.checkpoints import LAST_WEIGHTS, STATE, VELOCITIES
from orchestrator.train.record import RECORD
from orchestrator.train.run_folder import KEPT_EPOCH_PREFIX

ONLY_TO_RESUME = (VELOCITIES, LAST_WEIGHTS, STATE, RECORD)  # files of a checkpoint that nothing else needs


def is_kept(epoch: int, keep_every: int) -> bool:
    """Whether the weights after so many epochs are kept; keep_every: 0 for none."""
    return bool(keep_every) and epoch % keep_every == 0


def keep_weights(checkpoint: Path, run: StoragePath, epoch: int) -> None:
    """Copy a checkpoint that is not stored yet, without what only resuming needs, into the run's folder.

    The weights come last, each file whole or not at all: where they are, the rest is. An epoch that is trained again
    after a crash replaces them.
    """
    target = run / f"{KEPT_EPOCH_PREFIX}{epoch:04d}"
    files = [file for file in checkpoint.iterdir() if file.name not in ONLY_TO_RESUME]
    for file in sorted(files, key=lambda file: (file.name == WEIGHTS, file.name)):
        (target / file.name).write(file.read_bytes())
