"""Passwords and tokens, kept out of what is shown, logged and stored."""

import os
import re

SECRETS = (  # variables whose values never appear
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
)
URIS = ("MLFLOW_TRACKING_URI",)  # variables that may hold a password of any characters
CREDENTIALS = re.compile(r"(\w[\w+.-]{0,40}://)([^:/\s@]*)(?::(\S*))?@")  # of a URI; people do not escape "/" or "@"
_NAMED = (  # names of secrets, or parts of names
    r"[\w.%-]*(?:passw(?:or)?d|passphrase|pwd|token|secret|signature|credentials?"
    r"|(?:access|account|api|auth|encryption|private|secret|shared|signing|ssl)[_-]?key)[\w.-]*"
)
PARAMETER = re.compile(rf"([?&;](?:{_NAMED}|pass|pw|key|sig|auth|jwt)=)([^&;#\s\"'<>]+)", re.IGNORECASE)
SETTING = re.compile(r"(\b\w*passw(?:or)?d\s*=\s*)([^\s,;&\"')]+)", re.IGNORECASE)  # host=h password=x, of databases
HEADER = re.compile(
    r"(\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|digest|negotiate|token)\s+)?)([^\s\"',;]+)",
    re.IGNORECASE,
)
BEARER = re.compile(r"(\bbearer\s+)((?=\S*\d)[\w.~+/=-]{16,})", re.IGNORECASE)  # a token, not a word after "bearer"


def without_credentials(uri: str) -> str:
    """Without the user and the password before a URI's host: the address that a client connects to."""
    return CREDENTIALS.sub(r"\1", uri)


def redact(text: str) -> str:
    """Without the user and the password of a URI in it, and with *** for the secrets in its query and for those of
    headers: the address as it may be shown and stored."""
    return _without_named(without_credentials(text))


def credentials(uri: str) -> tuple[str, str] | None:
    """The user and the password of a URI, as they are written in it; None if it has neither."""
    found = CREDENTIALS.match(uri)
    return (found[2], found[3] or "") if found else None


def redact_all(text: str) -> str:
    """With *** for whatever is secret in a line of a log: what `redact` finds, and the values of SECRETS."""
    for uri in filter(None, map(os.environ.get, URIS)):
        if uri != redact(uri):
            text = text.replace(uri, redact(uri))
    text = _without_named(CREDENTIALS.sub(r"\1***@", text))
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return text


def _without_named(text: str) -> str:
    for pattern in (PARAMETER, HEADER, BEARER, SETTING):
        text = pattern.sub(r"\1***", text)
    return text
