"""Builds validated settings from fields or YAML, with one-line errors."""

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.base.storage import StoragePath

Settings = TypeVar("Settings", bound=BaseModel)


def make_model(model: type[Settings], **fields: Any) -> Settings:
    """Build and validate a model. Raises ValueError of one line that names the field, its value and what is wrong."""
    try:
        return model(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            name = str(first["loc"][0])  # the rest of loc names the branches of a union
            if first["type"] == "extra_forbidden":
                message = f"{name}: no such setting; --help lists them"
            else:
                message = f"{name} = {first['input']!r}: {message[0].lower()}{message[1:]}"
        raise ValueError(message) from None


def read_yaml(path: Path | str, flag: str = "--config") -> dict[str, Any]:
    """Read settings from a YAML file, given by path or URI, without validating them.

    Raises ValueError, naming the flag, for a missing file or one that is not a mapping, and StorageError if object
    storage does not answer.
    """
    try:
        source = StoragePath.of(path)
        text = source.local.read_text() if source.local is not None else source.read().decode()
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or 'no such file'}") from None
    return parse_yaml(text, f"{flag} {path}")


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Read settings from YAML text, without validating them. Raises ValueError if it is not a mapping."""
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"{where}: expected lines of the form 'setting: value'")
    return fields


def refuse_yes(value: Any, kind: Any) -> Any:
    """The value of a field of this type; raises ValueError for True in the place of a number: YAML reads `yes` as True,
    which pydantic would take for 1."""
    if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
        raise ValueError("expected a number")
    return value
