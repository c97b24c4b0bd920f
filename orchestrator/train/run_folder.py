"""A run's folder, OUTPUT/NAME: its resolved config, its result, and the checkpoints that Ray Train keeps there."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

from orchestrator.base.environment import default_output
from orchestrator.base.storage import StoragePath
from orchestrator.config.models import parse_yaml
from orchestrator.config.train import TrainConfig, make_config

CONFIG = "config.yaml"
RESULT = "result.json"
KEPT = "kept"  # beside the runs of a population: checkpoints that others may go on from


class RunFolder:
    """OUTPUT/NAME, on disk or in object storage."""

    def __init__(self, output: str | Path | StoragePath, name: str) -> None:
        """Raises ValueError for a name that is no plain folder name, or a URI that cannot be opened."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"--name {name!r}: use letters, digits, '.', '_' and '-' only, beginning with a letter or digit"
            )
        self.output, self.name = StoragePath.of(output), name
        self.path = self.output / name

    def exists(self) -> bool:
        return self.path.is_folder()

    def make(self) -> None:
        """Raises ValueError where the name is taken, because Ray Train would resume that run unasked."""
        if self.exists():
            raise ValueError(
                f"--name {self.name}: {self.path} exists; choose another name, or go on with: --resume {self.name}"
            )
        try:
            if self.path.local is not None:
                self.path.local.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"--output {self.output}: cannot be written: {error.strerror}") from None

    def create(self, config: TrainConfig) -> None:
        """Raises ValueError where the name is taken."""
        self.make()
        self.change(config)

    def config(self) -> TrainConfig:
        """The config of a run that was created before. Raises ValueError where there is none."""
        return make_config(**self.settings(CONFIG, "run"))

    def settings(self, file: str, what: str) -> dict[str, Any]:
        """What a YAML file of the folder says. Raises ValueError where there is no such folder."""
        if (self.path / file).size() is None:
            found = [name for name, is_folder in self.output.children().items()
                     if is_folder and (self.output / name / file).size() is not None]  # fmt: skip
            names = f"it has: {', '.join(found[-5:])}" if found else "it has none"
            raise ValueError(f"--resume {self.name}: no {what} of that name in {self.output}; {names}")
        return parse_yaml((self.path / file).read().decode(), str(self.path / file))

    def change(self, config: TrainConfig) -> None:
        self.write(CONFIG, config.to_yaml())

    def latest_checkpoint(self) -> str | None:
        """The last epoch's checkpoint, as Ray Train stored it."""
        found = [name for name in self.path.children() if name.startswith("checkpoint-epoch-")]
        return str(self.path / found[-1]) if found else None

    def result(self) -> dict[str, Any]:
        """What `write_result` wrote last, or nothing."""
        there = (self.path / RESULT).size() is not None
        found: dict[str, Any] = json.loads((self.path / RESULT).read()) if there else {}
        return found

    def write_result(self, result: dict[str, Any]) -> None:
        self.write(RESULT, json.dumps(result, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        (self.path / name).write(text.encode())

    def write_picture(self, name: str, figure: Any, dpi: int) -> None:
        """A matplotlib figure as PNG."""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=dpi)
        (self.path / name).write(png.getvalue())

    @property
    def flag(self) -> str:
        """The --output that a command needs which goes on here; empty where it is the default."""
        return "" if self.output == StoragePath.of(default_output()) else f" --output {shlex.quote(str(self.output))}"
