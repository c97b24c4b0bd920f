"""The description of a run in MLflow, which its page shows: what it is, on which data, its result, how to repeat it."""

import getpass

from orchestrator.base.markdown import code_block
from orchestrator.base.redaction import redact_all

NOTE, USER = "mlflow.note.content", "mlflow.user"  # tags
LONGEST_NOTE = 5000  # characters: a server refuses longer tags
PART = 1000  # characters of a command


def note(what: str, data: str, result: str, repeat: str) -> str:
    """Markdown. what, data, result: Markdown; repeat: a command line."""
    command = redact_all(repeat) if len(repeat) <= PART else f"{redact_all(repeat)[:PART]} ..."
    rows = (("Data", data), ("Result", result))
    return "\n\n".join([what, *(f"**{name}:** {text}" for name, text in rows), "**Repeat it:**", code_block(command)])


def user() -> str:
    """Who runs this process, as its system calls them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, in a container
        return "unknown"
