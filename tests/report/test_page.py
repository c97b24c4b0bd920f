"""A page needs nothing but itself, and shows text of strangers as text."""

import base64
import io

import PIL.Image
import pytest
from pages import Tags, assert_self_contained

from orchestrator.report.page import Picture, Section, Table, page

HOSTILE = [
    "<script>alert(1)</script>",
    '" onerror="alert(1)',
    "'><img src=x onerror=alert(1)>",
    "a\u202eb\x1b[2J\nc",
    "&lt;",
]
SHOWN = [*HOSTILE[:3], "a\\u202eb\\x1b[2J\\nc", "&lt;"]


def png():
    out = io.BytesIO()
    PIL.Image.new("RGB", (2, 3)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(("name", "expected"), list(zip(HOSTILE, SHOWN, strict=True)))
def test_text_of_strangers_is_shown_as_text(name, expected):
    parts = [Picture(png(), name, name), Table(name, [name], [[name, 1]])]
    text = page(name, [name], [Section(name, [name], parts), Section("other")])
    assert_self_contained(text)
    found = Tags(text)
    plain = Tags(page("t", ["t"], [Section("t", ["t"], [Picture(png(), "t", "t"), Table("t", ["t"], [["t", 1]])]),
                                   Section("other")]))  # fmt: skip
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags], "no tag comes of a name"
    assert found.texts.count(expected) == 10
    assert [each["alt"] for tag, each in found.tags if tag == "img"] == [expected]


def test_a_picture_is_in_the_page_to_the_last_byte():
    text = page("t", [], [Section("s", [], [Picture(png(), "what")])])
    (source,) = [each["src"] for tag, each in Tags(text).tags if tag == "img"]
    kind, data = source.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == png()


def test_a_page_is_for_phones_and_for_the_dark():
    text = page("t", [], [])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "<nav>" not in text, "nothing to choose among"
