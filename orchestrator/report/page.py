"""Self-contained HTML pages: pictures inside, no scripts, nothing fetched; readable offline, on a phone, in the dark.

All text is escaped: names of classes and files are of strangers.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.base.shown import shown

KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif", b"\xff\xd8": "image/jpeg"}  # by their first bytes
# nothing may be fetched or run, whatever a mistake here or there lets into the page
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --back: #fcfcfd; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --line: #363a3f; --back: #111113; --card: #18191b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: var(--ink); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem }
p { margin: .25rem 0 .75rem } .soft, figcaption { color: var(--soft); font-size: .9rem }
nav a { color: inherit; display: inline-block; margin-right: 1rem; padding: .25rem 0 }
figure { margin: .75rem 0; padding: .5rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card) }
.wide { overflow-x: auto; background: #fff; border-radius: .25rem }
.wide img { display: block; width: 100%; min-width: 44rem; height: auto; margin: 0 auto }
.wide img.narrow { width: auto; max-width: 100%; min-width: 0 }
.wide table { background: var(--card) } table { border-collapse: collapse; font-size: .9rem; width: 100% }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { font-variant-numeric: tabular-nums } summary { cursor: pointer; color: var(--soft) }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG, GIF or JPEG."""

    data: bytes
    alt: str  # what it shows, for those who do not see it
    caption: str = ""
    narrow: bool = False  # it is readable on a phone as it is; others can be pushed sideways there


@dataclass(frozen=True)
class Table:
    """Rows of text under their titles, folded away under a summary."""

    summary: str
    titles: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Section:
    """A heading, lines of text, then pictures and tables."""

    title: str
    text: Sequence[str] = ()
    parts: Sequence[Picture | Table] = ()


def page(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
    """An HTML document. facts: lines below the title."""
    links = "".join(f'<a href="#s{number}">{_text(section.title)}</a>' for number, section in enumerate(sections))
    body = "\n".join(_section(number, section) for number, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        + "".join(f'<p class="soft">{_text(fact)}</p>\n' for fact in facts)
        + (f"<nav>{links}</nav>\n" if len(sections) > 1 else "")
        + f"{body}\n</body>\n</html>\n"
    )


def _section(number: int, section: Section) -> str:
    lines = [f'<section id="s{number}">', f"<h2>{_text(section.title)}</h2>"]
    lines += [f"<p>{_text(line)}</p>" for line in section.text]
    lines += [_picture(part) if isinstance(part, Picture) else _table(part) for part in section.parts]
    return "\n".join([*lines, "</section>"])


def _picture(picture: Picture) -> str:
    kind = next((kind for start, kind in KINDS.items() if picture.data.startswith(start)), None)
    assert kind, f"a picture of an unknown kind: {picture.alt}"
    source = f"data:{kind};base64,{base64.b64encode(picture.data).decode()}"
    caption = f"\n<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
    form = ' class="narrow"' if picture.narrow else ""
    return f'<figure><div class="wide"><img{form} alt="{_text(picture.alt)}" src="{source}"></div>{caption}</figure>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in table.titles)
    rows = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<details><summary>{_text(table.summary)}</summary><div class="wide"><table>\n<tr>{head}</tr>\n{rows}\n'
        "</table></div></details>"
    )


def _text(text: object) -> str:
    """Escaped for text and for attributes; on one line, without what turns the direction of writing."""
    return html.escape(shown(text), quote=True)
