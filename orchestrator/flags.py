"""Command lines: flags made from the settings' own fields, and errors of one line."""

import argparse
import difflib
import inspect
import re
import sys
import types
import typing
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .exits import USAGE


class Parser(argparse.ArgumentParser):
    """argparse with the file's docstring as its help, no abbreviations, and a one-line error with a suggestion."""

    def __init__(self, prog: str, doc: str | None) -> None:
        super().__init__(
            prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            given = unknown[1].split("=")[0]
            near = difflib.get_close_matches(given, self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            message = f"unknown argument {given}; {hint}"
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(USAGE)


def add_fields(flags: Parser, model: type[BaseModel], defaults: BaseModel) -> None:
    """A flag for every field of the model, grouped by the class that declares it; defaults are shown, not set."""
    groups: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        owner = next(c for c in reversed(model.__mro__) if name in inspect.get_annotations(c))
        title = (owner.__doc__ or owner.__name__).splitlines()[0].rstrip(".").lower()
        if title not in groups:
            groups[title] = flags.add_argument_group(title)
        default = getattr(defaults, name)
        shown = (
            "automatic"
            if default is None
            else {True: "yes", False: "no"}[default]
            if field.annotation is bool
            else default
        )
        groups[title].add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{field.description} (default: {shown})".replace("%", "%%"),
            **_reading(name, field),
        )


def given_fields(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """The fields that the command line named, and only those."""
    return {name: value for name, value in vars(args).items() if name in model.model_fields}


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be negative")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return value


def _reading(name: str, field: FieldInfo) -> dict[str, Any]:
    """How argparse reads a field's value; ranges are left to the model, whose messages name what would work."""
    kind = field.annotation
    if isinstance(kind, types.UnionType):  # X | None, or int | str, which the model reads itself
        kind = [part for part in typing.get_args(kind) if part is not type(None)][-1]
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    for plain, metavar in ((int, "N"), (float, "X"), (str, "TEXT")):
        if kind is plain:
            return {"type": plain, "metavar": metavar}
    raise AssertionError(f"no flag for {name} of type {kind}")
