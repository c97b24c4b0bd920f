"""Versions of the files that a run, a search or a data set leaves (docs/formats.md)."""

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.base.shown import quoted

KEY = "schema_version"


def load_json(data: str | bytes) -> Any:
    """json.loads, whose every complaint is a ValueError of one line."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_version(document: Mapping[str, Any], supported: int, where: object) -> int:
    """The document's version; 0 for those written before files had one. Raises ValueError for a newer one."""
    found = document.get(KEY, 0)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"{where}: {KEY} is {quoted(found)}, which is not a version number")
    if found > supported:
        raise ValueError(
            f"{where}: was written by a newer version of alexnet-orchestrator ({KEY} {quoted(found)}; this one reads "
            f"up to {supported}); upgrade it to read this file"
        )
    return found
