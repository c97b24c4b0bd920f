"""make setup: the same lock by uv and by pip, and uv finds packages where pip is told to."""

import re
import subprocess

import pytest
import yaml
from conftest import ROOT

import install
from orchestrator.base.ray_internals import SUPPORTED_RAY

LISTED = """\
:env:.default-timeout='180'
:env:.index-url='https://user:secret@index.example/simple'
global.cert='/etc/company.pem'
global.extra-index-url='file:///a/simple\\nfile:///b/simple'
global.find-links='/wheels https://wheels.example'
global.index-url='https://global.example/simple'
global.no-index='true'
install.cert='/etc/install.pem'
list.format='columns'
"""


def test_what_pip_is_told_is_passed_on_to_uv():
    pip = install.pip_settings(LISTED)
    assert install.uv_environment(pip, {"PATH": "/bin"}) == {
        "PATH": "/bin",
        "UV_DEFAULT_INDEX": "https://user:secret@index.example/simple",
        "UV_INDEX": "file:///a/simple file:///b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,https://wheels.example",
        "UV_HTTP_TIMEOUT": "180",
        "UV_SYSTEM_CERTS": "1",
        "SSL_CERT_FILE": "/etc/install.pem",
    }
    assert install.uv_arguments(pip) == ["--no-index"]


def test_what_the_user_set_for_uv_wins():
    found = install.uv_environment(install.pip_settings(LISTED), {"UV_INDEX": "mine", "SSL_CERT_FILE": "mine.pem"})
    assert (found["UV_INDEX"], found["SSL_CERT_FILE"]) == ("mine", "mine.pem")


def test_without_any_settings_of_pip_uv_is_left_to_its_own():
    assert install.uv_environment({}, {}) == {"UV_SYSTEM_CERTS": "1"}
    assert install.uv_arguments({}) == []
    assert install.uv_arguments({"no-index": "false"}) == []


def test_the_settings_are_those_that_pip_itself_lists(monkeypatch, tmp_path):
    (tmp_path / "pip.conf").write_text("[global]\nextra-index-url =\n    file:///a\n    file:///b\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", "file:///it's here")
    listed = subprocess.run([*install.PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    found = install.pip_settings(listed)
    assert found["extra-index-url"].split() == ["file:///a", "file:///b"]
    assert found["index-url"] == "file:///it's here"


@pytest.fixture
def calls(monkeypatch):
    """The commands that would be run; those whose words contain one of `broken` fail."""
    made, broken = [], []

    def call(command, env=None):
        made.append(" ".join(map(str, command)))
        return int(any(word in made[-1] for word in broken))

    monkeypatch.setattr(install.subprocess, "call", call)
    return made, broken


def test_uv_comes_from_the_lock_and_installs_the_lock(calls, capsys):
    made, _ = calls
    assert install.main([]) == 0
    assert [bool(re.search("bin/uv pip install", command)) for command in made] == [False, True, True, False]
    assert made[3].endswith("-m alexnet.kernels")
    assert made[0].endswith("--constraint requirements.lock uv")
    assert made[1].endswith("--requirement requirements.lock")
    assert made[2].endswith("--no-build-isolation --no-deps --editable .")
    assert re.fullmatch(
        r"installing the packages of requirements.lock, .*\ninstalled requirements.lock in \d+ s\n"
        r"compiled the kernels in \d+ s\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize("word", ["requirements.lock uv", "bin/uv"])
def test_where_uv_cannot_be_had_pip_installs_the_same_lock_and_one_line_says_so(calls, capsys, word):
    made, broken = calls
    broken.append(word)
    assert install.main([]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "uv could not install the packages; pip does, which takes minutes"
    assert all("-m pip install" in command for command in made[-3:-1])
    assert [command.split("version-check ")[1] for command in made[-3:-1]] == [
        "--requirement requirements.lock", "--no-build-isolation --no-deps --editable .",
    ]  # fmt: skip


def test_where_uv_is_not_beside_the_interpreter_pip_installs(calls, monkeypatch, capsys):
    working = install.subprocess.call

    def call(command, env=None):
        if command[0].endswith("/uv"):
            raise FileNotFoundError(2, "No such file or directory")
        return working(command, env)

    monkeypatch.setattr(install.subprocess, "call", call)
    assert install.main([]) == 0
    out, err = capsys.readouterr()
    assert err.endswith("/uv: No such file or directory\n")
    assert out.splitlines()[1].startswith("uv could not install the packages; pip does")
    assert calls[0][-2].endswith("--editable .")


def test_a_failure_of_both_is_a_failure(calls):
    calls[1].append("install")
    assert install.main([]) == 1


def test_pip_can_be_asked_for(calls):
    assert install.main(["pip"]) == 0
    assert not [command for command in calls[0] if command.split()[0].endswith("/uv")]
    assert install.main(["conda"]) == 2


def test_the_lock_has_what_the_project_asks_for_and_names_no_index():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert not [line for line in text.splitlines() if line.startswith("-")]
    assert re.search(rf"^ray=={re.escape(SUPPORTED_RAY)}$", text, re.M)
    assert f'"ray[default,data,train,tune]=={SUPPORTED_RAY}"' in (ROOT / "pyproject.toml").read_text()
    assert f'rayVersion: "{SUPPORTED_RAY}"' in (ROOT / "clusters/kuberay.yaml").read_text()
    done = subprocess.run([*install.PIP, "check"], capture_output=True, text=True)
    assert "alexnet-orchestrator" not in done.stdout, done.stdout
    assert done.returncode == 0 or "requires" in done.stdout, done.stderr  # pip itself ran


def test_the_workflow_runs_what_ci_runs_on_the_oldest_python_that_is_supported():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    oldest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert job["strategy"]["matrix"]["python"][0] == oldest
    assert f"version_info >= ({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", ["cluster.yaml", "clusters/onprem.yaml"])
def test_nodes_get_every_file_that_make_setup_needs(name):
    recipe = re.search(r"^\.venv/ready: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    needed = {*recipe, "Makefile", "README.md", "LICENSE"}  # the last two are named by pyproject.toml
    assert needed <= set(yaml.safe_load((ROOT / name).read_text())["file_mounts"].values())
    copied = re.findall(r"^COPY --chown=ray (.*) \S+$", (ROOT / "clusters/Dockerfile").read_text(), re.M)
    assert needed <= set(" ".join(copied).split())
