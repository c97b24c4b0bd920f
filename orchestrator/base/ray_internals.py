"""Ray's private names: each module that relies on some lists them, and they are checked before they are used.

Private names change without notice between releases of Ray. Without this check a change would show as a traceback in
the middle of a run, or not at all. docs/upgrading-ray.md lists all of them.
"""

import dis
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.base.exits import JobError

SUPPORTED_RAY = "2.60.0"  # requirements.lock and pyproject.toml pin the same
TRACING = "_ray_trace_ctx"  # a parameter that Ray adds to the methods of actors
NUM_LISTED = 3  # differences in the one line that the user sees


@dataclass(frozen=True)
class PrivateName:
    """A name of Ray's, and what is relied on about it.

    parameters: of a function or class, in order, with their stars, such as ("self", "fn", "*fn_args"); None: it must
    only exist. attributes: of a class's instances, which it or a base class must set in __init__.
    """

    module: str
    name: str  # within the module, with dots, such as "TrainController.run"
    parameters: tuple[str, ...] | None = None
    attributes: tuple[str, ...] = ()

    def difference(self) -> str | None:
        """How the installed Ray differs, in a few words; None if it does not."""
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name} is missing"
        if self.parameters is not None and (has := _parameters(found)) != self.parameters:
            return f"{self.module}.{self.name}({', '.join(has)}) should be ({', '.join(self.parameters)})"
        missing = [name for name in self.attributes if name not in _set_in_init(found)]
        return f"{self.module}.{self.name} has no attribute {missing[0]}" if missing else None


def require(package_version: str, table: Sequence[PrivateName]) -> None:
    """Check that Ray is of the version `package_version` and has the names of the table.

    Raises JobError, in one line, with the supported version and what differs.
    """
    import ray

    differences = [text for entry in table if (text := entry.difference())]
    if ray.__version__ == package_version and not differences:
        return
    texts = [f"Ray {ray.__version__} is installed, and only Ray {package_version} is supported"]
    if differences:
        more = f"; and {len(differences) - NUM_LISTED} more" if len(differences) > NUM_LISTED else ""
        texts.append(f"what differs: {'; '.join(differences[:NUM_LISTED])}{more}")
    raise JobError(", ".join(texts) + f"; install it with: pip install 'ray=={package_version}'")


def _parameters(found: Any) -> tuple[str, ...]:
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return ("not callable",)
    return tuple(stars.get(each.kind, "") + each.name for each in parameters if each.name != TRACING)


def _set_in_init(found: type) -> set[str]:
    """Attributes of a class, and of its instances: what __init__, its own or a base's, assigns."""
    names = set(dir(found))
    for base in found.__mro__ if inspect.isclass(found) else ():
        if inspect.isfunction(init := vars(base).get("__init__")):
            names |= {str(step.argval) for step in dis.get_instructions(init) if step.opname == "STORE_ATTR"}
    return names
