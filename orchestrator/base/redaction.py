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
CREDENTIALS = re.compile(r"(\w[\w+.-]*://)([^:/\s@]*)(?::(\S*))?@")  # of a URI; people do not escape "/" or "@"


def redact(text: str) -> str:
    """Without the user and the password of a URI in it: the address as it may be shown and stored."""
    return CREDENTIALS.sub(r"\1", text)


def credentials(uri: str) -> tuple[str, str] | None:
    """The user and the password of a URI, as they are written in it; None if it has neither."""
    found = CREDENTIALS.match(uri)
    return (found[2], found[3] or "") if found else None


def redact_all(text: str) -> str:
    """With *** for whatever is secret in a line of a log: credentials of URIs, and the values of SECRETS."""
    for uri in filter(None, map(os.environ.get, URIS)):
        if uri != redact(uri):
            text = text.replace(uri, redact(uri))
    text = CREDENTIALS.sub(r"\1***@", text)
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return text
