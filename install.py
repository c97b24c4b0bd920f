"""Install the packages of requirements.lock and this project into the environment that runs it; `make setup` calls it.

    .venv/bin/python install.py          with uv, which takes seconds; with pip if uv is not available
    .venv/bin/python install.py pip      with pip, which takes minutes

Both install the same lock. pip installs uv first, at the lock's version. uv does not read pip's configuration, so that
indexes, certificates and proxies are passed on to it in its environment; nothing of them is written anywhere.
"""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

LOCK = "requirements.lock"
PIP = [sys.executable, "-m", "pip"]
QUIET = ["-qq", "--disable-pip-version-check"]  # errors only
LOCKED = ["--requirement", LOCK]
# setuptools, which builds it, is in the lock
PROJECT = ["--no-build-isolation", "--no-deps", "--editable", "."]

UV_NAMES = {  # pip's setting: uv's environment variable, and what separates several values
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "proxy": ("ALL_PROXY", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
}


def pip_settings(listed: str) -> dict[str, str]:
    """`pip config list` by name. Where one is set twice: the environment wins over [install], that over [global]."""
    found: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        rank = {"global": 0, "install": 1, ":env:": 2}.get(section)
        if rank is not None and rank >= found.get(name, (0,))[0]:
            found[name] = rank, str(ast.literal_eval(value))
    return {name: value for name, (_, value) in found.items()}


def uv_environment(pip: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which uv finds packages where pip does. What the user set for uv is left as it is."""
    ours = {"UV_SYSTEM_CERTS": "1"}  # as pip: a company's own authority is trusted
    for name, (variable, separator) in UV_NAMES.items():
        if pip.get(name):
            ours[variable] = separator.join(pip[name].split())
    if "UV_INDEX" in ours:
        ours["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip: all indexes are equal
    return ours | dict(environment)


def uv_arguments(pip: Mapping[str, str]) -> list[str]:
    """What uv takes as arguments only."""
    return ["--no-index"] if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else []


def install_with_uv() -> bool:
    """Whether it could be done."""
    if subprocess.call([*PIP, "install", *QUIET, "--constraint", LOCK, "uv"]):
        return False
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    settings = pip_settings(listed)
    environment = uv_environment(settings, os.environ)
    # Quiet, as uv would warn where its cache is on another file system. Compiled once here, as pip does: a process that
    # has to compile Ray and MLflow first takes twice as long to start, and a run starts many.
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--python", sys.executable]
    uv += ["--compile-bytecode", *uv_arguments(settings)]
    try:
        return not any(subprocess.call([*uv, *what], env=environment) for what in (LOCKED, PROJECT))
    except OSError as error:  # pip may have put it elsewhere, as with PIP_TARGET or PIP_USER
        print(f"{uv[0]}: {error.strerror}", file=sys.stderr)
        return False


def install_with_pip() -> bool:
    return not any(subprocess.call([*PIP, "install", *QUIET, *what]) for what in (LOCKED, PROJECT))


def compile_kernels() -> None:
    """Compile now what the first training step would compile otherwise, on every node again."""
    start = time.monotonic()
    if not subprocess.call([sys.executable, "-m", "alexnet.kernels"]):  # else they are compiled when they are used
        print(f"compiled the kernels in {time.monotonic() - start:.0f} s", flush=True)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["uv"], ["pip"]):
        print(f"install.py: {' '.join(arguments)}: expected uv or pip", file=sys.stderr)
        return 2
    start = time.monotonic()
    print(f"installing the packages of {LOCK}, about 7 GB with PyTorch's CUDA libraries", flush=True)
    installed = arguments != ["pip"] and install_with_uv()
    if not installed:
        if arguments != ["pip"]:
            print("uv could not install the packages; pip does, which takes minutes", flush=True)
        installed = install_with_pip()
    if installed:
        print(f"installed {LOCK} in {time.monotonic() - start:.0f} s", flush=True)
        compile_kernels()
    return 0 if installed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
