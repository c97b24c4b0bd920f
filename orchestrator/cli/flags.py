"""Command lines: a flag for every field of the settings, and one-line errors."""

import argparse
import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator import __version__
from orchestrator.base import logs
from orchestrator.base.environment import command, installed
from orchestrator.base.exits import USAGE, one_line, run_job
from orchestrator.tracking.registry import check_name

DEFAULT_RECIPE = "digits"
METAVARS = {  # where the type alone says too little
    "data": "DIR", "workers": "N", "time_budget": "TIME", "preset": "NAME", "freeze": "LAYERS", "lr_factor": "LAYER=X",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as its help, no abbreviations, one-line errors with a suggestion, and the
    flags that all commands have."""

    def __init__(self, job: str, doc: str | None) -> None:
        prog = command(job).rpartition("/")[2]
        super().__init__(
            prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.add_argument("--version", action="version", version=f"alexnet-orchestrator {__version__}")
        self.add_argument("-v", "--verbose", action="store_true", help="show the log on standard error")

    def format_help(self) -> str:
        """Commands in it are named as the user started this one."""
        text = super().format_help()
        return re.sub(r"(python )?jobs/(\w+)\.py", lambda found: command(found[2]), text) if installed() else text

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            given = unknown[1].split("=")[0]
            near = difflib.get_close_matches(given, self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            message = f"unknown argument {given}; {hint}"
        print(f"{self.prog}: error: {one_line(message)}", file=sys.stderr)
        raise SystemExit(USAGE)


def run(parser: Callable[[], Parser], main: Callable[[Parser, argparse.Namespace], int]) -> int:
    """A command from its arguments to its exit status."""

    def start() -> int:
        flags = parser()
        args = flags.parse_args()
        for name, value in vars(args).items():
            texts = value if isinstance(value, list) else [value]
            if "" in texts:  # as of a variable of the shell that is not set
                flags.error(f"{name}: is empty")
        logs.set_up(args.verbose)
        return main(flags, args)

    return run_job(start, logs.run_log)


def add_fields(flags: Parser, model: type[BaseModel], defaults: BaseModel) -> None:
    """Add a flag for every field of the model, grouped by the class that declares it; defaults are shown, not set."""
    groups: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        owner = next(c for c in reversed(model.__mro__) if name in inspect.get_annotations(c))
        title = (owner.__doc__ or owner.__name__).splitlines()[0].rstrip(".").lower()
        if title not in groups:
            groups[title] = flags.add_argument_group(title)
        default = getattr(defaults, name)
        shown = (
            ("automatic" if "automatic" in (field.description or "") else "none")
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


def add_recipe(flags: Parser, recipes: Collection[str]) -> None:
    """Add the positional argument; `recipe_of` reads it."""
    shown = f"one of {', '.join(recipes)} (default: {DEFAULT_RECIPE}); the defaults below are those of this recipe"
    flags.add_argument("recipe", nargs="?", metavar="RECIPE", help=shown)


def add_register(group: Any, what: str) -> None:
    """Add --register. what: that is registered."""
    text = f"register {what} in MLflow under this name, as its next version; models:/NAME/VERSION is then its address"
    group.add_argument("--register", metavar="NAME", type=registered_name, help=text)


def registered_name(text: str) -> str:
    try:
        return check_name("NAME", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shown_recipe(recipes: Collection[str]) -> str:
    """The recipe whose defaults --help shows: the one on the command line, which is not parsed yet."""
    return next((word for word in sys.argv[1:] if word in recipes), DEFAULT_RECIPE)


def recipe_of(args: argparse.Namespace, recipes: Collection[str]) -> str:
    """The recipe that was asked for. Raises ValueError of one line."""
    recipe: str = args.recipe or DEFAULT_RECIPE
    if recipe not in recipes:
        raise ValueError(f"recipe {recipe!r}: unknown; the recipes are {', '.join(recipes)}")
    return recipe


def only_resume(args: argparse.Namespace, *others: str) -> None:
    """Raises ValueError of one line if an argument contradicts --resume, which takes the settings of before."""
    for flag in ("recipe", *others):
        if getattr(args, flag):
            shown = "RECIPE" if flag == "recipe" else f"--{flag.replace('_', '-')}"
            raise ValueError(f"--resume {args.resume}: resumes with the settings it has; leave out {shown}")


def given_fields(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """Only the fields that were given on the command line."""
    return {name: value for name, value in vars(args).items() if name in model.model_fields}


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
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


def part(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and below 1")
    return value


def _reading(name: str, field: FieldInfo) -> dict[str, Any]:
    """How argparse reads a field's value; ranges are left to the model, whose messages say what would work."""
    kind = field.annotation
    if isinstance(kind, types.UnionType):  # X | None, or int | str, which the model parses
        kind = [part for part in typing.get_args(kind) if part is not type(None)][-1]
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    for plain, metavar in ((int, "N"), (float, "X"), (str, "TEXT")):
        if kind is plain:
            return {"type": plain, "metavar": METAVARS.get(name, metavar)}
    raise AssertionError(f"no flag for {name} of type {kind}")
