"""What is said of a Ray whose private names differ."""

import sys
from types import ModuleType

import pytest
import ray
from conftest import ROOT

from orchestrator.base.exits import JobError
from orchestrator.base.ray_internals import SUPPORTED_RAY, PrivateName, require


class Base:
    def __init__(self):
        self._inherited = 1


class Thing(Base):
    known = 0

    def __init__(self, first, *rest, last=None, **more):
        super().__init__()
        self._own = first

    def call(self, value): ...


@pytest.fixture(autouse=True)
def module(monkeypatch):
    made = ModuleType("ray.private_part")
    made.Thing = Thing
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def name(name, parameters=None, attributes=()):
    return PrivateName("ray.private_part", name, parameters, attributes)


def test_names_that_are_as_expected_pass():
    require(
        ray.__version__,
        [
            name("Thing", ("first", "*rest", "last", "**more"), ("_own", "_inherited", "known")),
            name("Thing.call", ("self", "value")),
            name("Thing.known"),
        ],
    )


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (name("Gone"), "ray.private_part.Gone is missing"),
        (name("Thing.gone"), "ray.private_part.Thing.gone is missing"),
        (PrivateName("ray.gone", "Thing"), "ray.gone.Thing is missing"),
        (name("Thing.call", ("self",)), "ray.private_part.Thing.call(self, value) should be (self)"),
        (
            name("Thing", ("first", "rest", "last", "**more")),
            "Thing(first, *rest, last, **more) should be (first, rest",
        ),
        (name("Thing.known", ("self",)), "Thing.known(not callable) should be (self)"),
        (name("Thing", None, ("_own", "_gone")), "ray.private_part.Thing has no attribute _gone"),
    ],
)
def test_a_name_that_differs_is_named_in_one_line(entry, words):
    with pytest.raises(JobError) as error:
        require(ray.__version__, [name("Thing"), entry])
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert f"only Ray {ray.__version__} is supported, what differs: ray." in str(error.value)


def test_another_version_is_refused_even_if_every_name_is_there():
    with pytest.raises(JobError) as error:
        require("1.2.3", [name("Thing")])
    assert str(error.value) == (
        f"Ray {ray.__version__} is installed, and only Ray 1.2.3 is supported; "
        "install it with: pip install 'ray==1.2.3'"
    )


def test_of_many_differences_the_first_are_listed_and_the_others_counted():
    with pytest.raises(JobError, match=r"differs: \S+a is missing; \S+b is missing; \S+c is missing; and 2 more;"):
        require(ray.__version__, [name(letter) for letter in "abcde"])


def test_the_supported_ray_is_the_pinned_one():
    assert f"ray=={SUPPORTED_RAY}" in (ROOT / "requirements.lock").read_text().split()
    assert ray.__version__ == SUPPORTED_RAY
