"""A run's folder, OUTPUT/NAME: its config, its result, its log, and the checkpoints that Ray Train stores there."""

import io
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.base import schema
from orchestrator.base.environment import default_output
from orchestrator.base.shown import quoted
from orchestrator.base.storage import StoragePath
from orchestrator.config.models import parse_yaml
from orchestrator.config.train import TrainConfig, make_config
from orchestrator.data.shards import Manifest

CONFIG = "config.yaml"
RESULT = "result.json"
RESULT_VERSION = 2
RESULT_KINDS: dict[str, Any] = {  # of what is read of it again
    "name": str, "status": str, "recipe": str, "config": dict, "mlflow_run_id": str, "mlflow_tracking_uri": str,
    "history": list, "metrics": dict, "best": (dict, int), "checkpoint": str, "best_checkpoint": str,
    "cost_usd": (int, float), "elapsed_s": (int, float), "classes": list, "digest": str, "per_class": list,
    "started_from": str,
}  # fmt: skip
RUN_LOG = "run.log"
CHECKPOINT_PREFIX = "checkpoint-epoch-"  # of a folder in it
KEPT_EPOCH_PREFIX = "kept-epoch-"  # of a folder with weights that stay (orchestrator/train/keep.py)
KEPT = "kept"  # beside the runs of a population: checkpoints that other trials may continue from


class RunFolder:
    """OUTPUT/NAME, on disk or in object storage."""

    def __init__(self, output: str | Path | StoragePath, name: str, flag: str = "--name") -> None:
        """Raises ValueError for a name that is not a plain folder name, or a URI that cannot be opened.

        flag: that the name was given by.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}", name):
            raise ValueError(
                f"{flag} {name!r}: use at most 150 letters, digits, '.', '_' and '-', and begin with a letter or digit"
            )
        self.output, self.name = StoragePath.of(output), name
        self.path = self.output / name

    def exists(self) -> bool:
        return self.path.is_folder()

    def make(self) -> None:
        """Make the folder. Raises ValueError if there is one: Ray Train would resume the run in it unasked."""
        if self.exists():
            raise ValueError(
                f"--name {self.name}: {self.path} exists; choose another name, or resume it with: --resume {self.name}"
            )
        try:
            if self.path.local is not None:
                self.path.local.mkdir(parents=True)
        except OSError as error:
            raise ValueError(
                f"--output {self.output}: cannot be written ({error.strerror}); choose another folder"
            ) from None

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write the config. Raises ValueError if the name is taken."""
        self.make()
        self.change(config)

    def config(self) -> TrainConfig:
        """The config of an existing run. Raises ValueError if there is none."""
        return make_config(**self.settings(CONFIG, "run"))

    def settings(self, file: str, what: str) -> dict[str, Any]:
        """The settings in a YAML file of the folder. what: "run" or "search". Raises ValueError if there is no file."""
        if (self.path / file).size() is None:
            found = [name for name, is_folder in self.output.children().items()
                     if is_folder and (self.output / name / file).size() is not None]  # fmt: skip
            names = f"it has: {', '.join(found[-5:])}" if found else "it has none"
            raise ValueError(f"--resume {self.name}: no {what} of that name in {self.output}; {names}")
        return parse_yaml((self.path / file).read(), str(self.path / file))

    def change(self, config: TrainConfig) -> None:
        """Replace the config."""
        self.write(CONFIG, config.to_yaml())

    def latest_checkpoint(self) -> str | None:
        """The path of the newest checkpoint; None if there is none."""
        found = [name for name in self.path.children() if name.startswith(CHECKPOINT_PREFIX)]
        return str(self.path / found[-1]) if found else None

    def result(self) -> dict[str, Any]:
        """What `write_result` wrote last; empty if it never did. Raises ValueError for a damaged or a newer file."""
        file = self.path / RESULT
        if file.size() is None:
            return {}
        try:
            found = schema.load_json(file.read())
        except ValueError as error:
            raise ValueError(f"{file}: is not JSON ({error}); restore it, or remove it to resume without it") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file}: is not a JSON object; restore it, or remove it to resume without it")
        schema.check_version(found, RESULT_VERSION, file)
        found.pop(schema.KEY, None)
        for name, kinds in RESULT_KINDS.items():
            value = found.get(name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(
                    f"{file}: damaged: {name} is {quoted(value)}; restore it, or remove it to resume anyway"
                )
        if any(not isinstance(entry, dict) or "epoch" not in entry for entry in found.get("history") or ()):
            raise ValueError(f"{file}: damaged: history has no epochs; restore it, or remove it to resume without it")
        rows = found.get("per_class") or ()
        if any(
            not isinstance(row, dict) or not row.keys() >= {"class", "top1_error", "best_top1_error"} for row in rows
        ):
            raise ValueError(
                f"{file}: damaged: per_class has no classes; restore it, or remove it to resume without it"
            )
        return found

    def write_result(self, result: dict[str, Any]) -> None:
        """Replace result.json, in the current version (docs/formats.md)."""
        self.write(RESULT, json.dumps({schema.KEY: RESULT_VERSION} | result, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Replace a text file."""
        (self.path / name).write(text.encode())

    def write_picture(self, name: str, figure: Any, dpi: int) -> None:
        """Replace a PNG by a matplotlib figure."""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=dpi)
        (self.path / name).write(png.getvalue())

    @property
    def flag(self) -> str:
        """The --output flag of a command that resumes here; empty if it is the default."""
        return "" if self.output == StoragePath.of(default_output()) else f" --output {shlex.quote(str(self.output))}"


def locate(output: str, resume: str) -> tuple[str, str]:
    """The --output and the name of the run that --resume NAME or --resume OUTPUT/NAME asks for.

    Raises ValueError of one line if `output` is given, too, and is another folder.
    """
    base, mark, query = resume.partition("?") if "://" in resume else (resume, "", "")
    place, slash, name = base.rstrip("/").rpartition("/")
    if not slash:
        return output, name
    found = (place or "/") + mark + query
    if output != default_output() and StoragePath.of(output) != StoragePath.of(found):
        raise ValueError(f"--resume {resume}: is not in --output {output}; leave out --output, or give the name alone")
    return found, name


def check_identity(result: Mapping[str, Any], manifest: Manifest, data: StoragePath) -> str | None:
    """A line if the images in `data` are others than those that a run began with; None if they are the same.

    result: the run's; one without `classes` was written by 0.2 or earlier. Raises ValueError of one line if the classes
    differ: the outputs of the net would be taken for others.
    """
    before, now = result.get("classes"), list(manifest.classes)
    if before is not None and before != now:
        if len(before) != len(now):
            what = f"has {len(now)} classes, and the run {len(before)}"
        else:
            label = next(i for i, (old, new) in enumerate(zip(before, now, strict=True)) if old != new)
            what = f"its class {label} is {now[label]!r}, and the run's is {before[label]!r}"
        raise ValueError(f"--data {data}: {what}; resume with the classes that it was trained on, or start a new run")
    if result.get("digest") in (None, manifest.digest):
        return None
    return (
        f"the images in {data} are not those that it was trained on until now: "
        f"their digest is {manifest.digest}, and was {result['digest']}"
    )
