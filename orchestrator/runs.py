"""A run's folder, OUTPUT/NAME: its resolved config, its result, and the checkpoints that Ray Train keeps there."""

import json
import os
import re
from pathlib import Path
from typing import Any

from .config import TrainConfig, make_config, read_yaml

CONFIG = "config.yaml"
RESULT = "result.json"
KEPT = "kept"  # beside the runs of a population: checkpoints that others may go on from


class RunFolder:
    """OUTPUT/NAME, absolute."""

    def __init__(self, output: Path, name: str) -> None:
        """Raises ValueError for a name that is no plain folder name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"--name {name!r}: use letters, digits, '.', '_' and '-' only, beginning with a letter or digit"
            )
        self.output, self.name, self.path = output.absolute(), name, output.absolute() / name

    def make(self) -> None:
        """Raises ValueError where the name is taken, because Ray Train would resume that run unasked."""
        if self.path.exists():
            raise ValueError(
                f"--name {self.name}: {self.path} exists; choose another name, or go on with: --resume {self.name}"
            )
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"--output {self.output}: cannot be written: {error.strerror}") from None

    def create(self, config: TrainConfig) -> None:
        """Raises ValueError where the name is taken."""
        self.make()
        (self.path / CONFIG).write_text(config.to_yaml())

    def config(self) -> TrainConfig:
        """The config of a run that was created before. Raises ValueError where there is none."""
        if not (self.path / CONFIG).is_file():
            raise ValueError(f"--resume {self.name}: no run of that name in {self.output}; {_listing(self.output)}")
        return make_config(**read_yaml(self.path / CONFIG))

    def change(self, config: TrainConfig) -> None:
        (self.path / CONFIG).write_text(config.to_yaml())

    def latest_checkpoint(self) -> str | None:
        """The last epoch's checkpoint, as Ray Train stored it."""
        found = sorted(self.path.glob("checkpoint-epoch-*"))
        return str(found[-1]) if found else None

    def result(self) -> dict[str, Any]:
        """What `write_result` wrote last, or nothing."""
        path = self.path / RESULT
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def write_result(self, result: dict[str, Any]) -> None:
        partial = self.path / (RESULT + ".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, self.path / RESULT)


def _listing(output: Path) -> str:
    names = sorted(path.parent.name for path in output.glob(f"*/{CONFIG}")) if output.is_dir() else []
    return f"it has: {', '.join(names[-5:])}" if names else "it has none"
