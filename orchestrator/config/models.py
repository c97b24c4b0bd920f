"""Builds validated settings from fields or YAML, with one-line errors."""

import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.base.shown import LONGEST_VALUE, quoted, shown
from orchestrator.base.storage import StoragePath

MAX_YAML_BYTES = 100_000  # the largest search.yaml has a few thousand
MAX_YAML_DEPTH = 10  # a search has 4
MAX_WHOLE_DEPTH, MAX_WHOLE_NODES = 50, 100_000  # of a YAML that is another program's, its aliases written out
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
OCTAL = re.compile(r"[-+]?0o[0-7]+")  # of YAML 1.2; a text in 1.1
LONGEST_MESSAGE = 250

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
                message = f"{shown(name, LONGEST_VALUE)}: no such setting; --help lists them"
            else:
                message = f"{name} = {quoted(first['input'])}: {message[0].lower()}{message[1:]}"
        raise ValueError(shown(message, LONGEST_MESSAGE)) from None


def read_yaml(path: Path | str, flag: str = "--config") -> dict[str, Any]:
    """Read settings from a YAML file, given by path or URI, without validating them.

    Raises ValueError, naming the flag, for a missing file or one that is not a mapping, and StorageError if object
    storage does not answer.
    """
    try:
        source = StoragePath.of(path)
        if source.local is not None:
            with source.local.open("rb") as file:
                data = file.read(MAX_YAML_BYTES + 1)
        else:
            data = source.read_at(0, MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or 'no such file'}") from None
    return parse_yaml(data, f"{flag} {path}")


def parse_yaml(text: str | bytes, where: str) -> dict[str, Any]:
    """Read settings from YAML, without validating them. Raises ValueError of one line if it is not a mapping.

    A small part of YAML, in which a text means one thing only: a single document without anchors, aliases and tags, no
    key twice, whole numbers in plain decimal digits. `yes` and `no` are switches, and 1e-5 is a text, as in YAML 1.1.
    """
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MAX_YAML_BYTES:
        raise ValueError(f"{where}: more than {MAX_YAML_BYTES} bytes: these are no settings")
    try:
        text = data.decode()
        _check_structure(text)
        node = yaml.compose(text, yaml.SafeLoader)
        fields = _value(node) if node is not None else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not text in UTF-8 (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}: not YAML: {line}{shown(error.problem or error.context, LONGEST_MESSAGE)}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {shown(str(error).splitlines()[0], LONGEST_MESSAGE)}") from None
    except _Refused as refusal:
        raise ValueError(f"{where}, line {refusal.line}: {refusal}") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"{where}: expected lines of the form 'setting: value'")
    return fields


def read_whole_yaml(path: Path) -> Any:
    """The value of a YAML file of another program, such as a cluster's: all of YAML, but no more of it than such a file
    could need. Raises ValueError of one line, OSError where the file cannot be read."""
    with path.open("rb") as file:
        data = file.read(MAX_YAML_BYTES + 1)
    if len(data) > MAX_YAML_BYTES:
        raise ValueError(f"{path}: more than {MAX_YAML_BYTES} bytes: this describes no cluster")
    try:
        text = data.decode()
        _check_growth(text)
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8 (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{path}: not YAML: {line}{shown(error.problem or error.context, LONGEST_MESSAGE)}") from None
    except _Refused as refusal:
        raise ValueError(f"{path}, line {refusal.line}: {refusal}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:  # a date that is none, say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not YAML: {shown(reason, LONGEST_MESSAGE)}") from None


def dump_yaml(parts: dict[str, Any], **options: Any) -> str:
    """YAML that `parse_yaml` reads as the same values. options: of yaml.dump."""
    text: str = yaml.dump(parts, Dumper=_Dumper, sort_keys=False, **options)
    return text


class _Dumper(yaml.SafeDumper):
    """Puts texts such as 08 in quotes, too, which `parse_yaml` wants."""


_Dumper.add_implicit_resolver("!number", re.compile(rf"(?:{LEADING_ZERO.pattern}|{OCTAL.pattern})$"), list("-+0"))


class _Refused(Exception):
    """Something that YAML allows and settings do not."""

    def __init__(self, mark: Any, message: str) -> None:
        super().__init__(message)
        self.line = mark.line + 1


def _check_structure(text: str) -> None:
    """Refuse what could grow or nest without end, before anything is made of it. Raises _Refused, yaml.YAMLError."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if anchor := getattr(event, "anchor", None):  # an alias has the name of its anchor there
            raise _Refused(event.start_mark, f"anchor or alias {quoted(anchor)}: write the value out")
        if tag := getattr(event, "tag", None):
            raise _Refused(event.start_mark, f"tag {quoted(tag)}: leave it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise _Refused(event.start_mark, f"nested more than {MAX_YAML_DEPTH} deep")


def _check_growth(text: str) -> None:
    """Refuse what nests, or grows by its aliases, without end. Raises _Refused, yaml.YAMLError."""
    sizes: dict[str, int] = {}  # of what has an anchor, aliases written out
    held: list[list[Any]] = [["", 0]]  # anchor and size of each collection around
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            held.append([anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            name, size = held.pop()
            sizes[name] = size
            held[-1][1] += size
        elif isinstance(event, yaml.AliasEvent):
            if any(name == anchor for name, _ in held):
                raise _Refused(event.start_mark, f"alias {quoted(anchor)}: stands within what it stands for")
            held[-1][1] += sizes.get(anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[anchor or ""] = 1
            held[-1][1] += 1
        if len(held) > MAX_WHOLE_DEPTH + 1:
            raise _Refused(event.start_mark, f"nested more than {MAX_WHOLE_DEPTH} deep")
        if held[-1][1] > MAX_WHOLE_NODES:
            raise _Refused(event.start_mark, f"more than {MAX_WHOLE_NODES} values, its aliases written out")


def _value(node: Any) -> Any:
    """What a node stands for. Raises _Refused."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _Refused(key_node.start_mark, "a name is expected before the colon, not a list or mapping")
        key = _scalar(key_node)
        if key in found:
            raise _Refused(key_node.start_mark, f"{quoted(key_node.value)} is there twice; leave one out")
        found[key] = _value(value_node)
    return found


def _scalar(node: Any) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return yaml.SafeLoader.bool_values[text.lower()]
    if kind == "int" and DECIMAL.fullmatch(text) and len(text) <= 20:
        return int(text)
    if kind == "float" and not re.search("[_:]", text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    plain = node.style is None and (LEADING_ZERO.fullmatch(text) or OCTAL.fullmatch(text))
    if kind in ("int", "float") or plain:
        if len(text) > 20:
            raise _Refused(node.start_mark, f"{quoted(text)}: a number of too many digits")
        raise _Refused(node.start_mark, f'{shown(text)}: is read in several ways; write {_meant(text)} or "{text}"')
    return text


def _meant(text: str) -> str:
    """The number that a text most likely stands for, in decimal digits."""
    plain = text.replace("_", "").lower()
    if ":" in plain:  # hours, minutes and seconds
        total = 0.0
        for part in plain.lstrip("+-").split(":"):
            total = 60 * total + float(part)
        return f"{'-' if plain.startswith('-') else ''}{total:g}"
    if re.fullmatch(r"[-+]?0[xob].+", plain):
        return str(int(plain, 0))
    return str(int(plain)) if re.fullmatch(r"[-+]?[0-9]+", plain) else f"{float(plain):g}"


def refuse_yes(value: Any, kind: Any) -> Any:
    """The value of a field of this type; raises ValueError for True in the place of a number: YAML reads `yes` as True,
    which pydantic would take for 1."""
    if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
        raise ValueError("expected a number")
    return value
