"""Which images of a source without a validation part are for validation: by lot, copies of a photograph on one side.

What was drawn can be kept beside an unfinished preparation: as long as files, fraction and seed are the same, resuming
it does not look at all images again.
"""

import hashlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from orchestrator.base.shown import count_of
from orchestrator.data.sources import near, same
from orchestrator.data.sources.listing import Entry, Say, versions

VAL_FRACTION = 0.2
VERSION = 1  # of what is kept, and of the rules by which it was drawn
MANY = 2_000  # images: so many take some seconds, which is said


@dataclass(frozen=True)
class Drawn:
    """What was drawn, and what was said of it."""

    digest: str  # of all that it depends on; empty if no image was to be looked at
    val: tuple[int, ...]  # ids, before the images of both parts are numbered
    lines: tuple[str, ...]
    warnings: tuple[str, ...]  # images that are in both parts, or nearly

    def to_json(self) -> dict[str, Any]:
        """What `of_json` reads."""
        return {"schema_version": VERSION} | asdict(self)

    @staticmethod
    def of_json(found: Any) -> "Drawn":
        """Raises ValueError for anything else."""
        if (
            not isinstance(found, dict)
            or found.get("schema_version") != VERSION
            or type(found.get("digest")) is not str
        ):
            raise ValueError("not what was drawn")
        lists = {name: found.get(name) for name in ("val", "lines", "warnings")}
        for name, values in lists.items():
            kind = int if name == "val" else str
            if not isinstance(values, list | tuple) or any(type(value) is not kind for value in values):
                raise ValueError(f"{name} is not a list of {kind.__name__}")
        return Drawn(found["digest"], **{name: tuple(values or ()) for name, values in lists.items()})


@dataclass
class Draw:
    """How validation images are drawn, where they are."""

    fraction: float | None = None  # the user's; None: only where there is no part for validation
    seed: int = 0
    blind: str = ""  # why near-duplicates are not looked for, if they are not
    earlier: Drawn | None = None  # by an interrupted preparation
    progress: Say = lambda line: None  # takes lines that are of the moment, and no part of what was found
    drawn: Drawn | None = None  # what has been, by `with_val_drawn`


def with_val_drawn(train: list[Entry], say: Say, draw: Draw, where: str = "") -> dict[str, list[Entry]]:
    """Training images as train and val, and lines about it."""
    fraction = draw.fraction or VAL_FRACTION
    why = "as --val-fraction says" if draw.fraction else "there is no part for it; --val-fraction changes that"
    say(f"{where}{fraction:g} of every class is for validation, by seed {draw.seed}: {why}")
    refusal = near.refusal(train)
    digest = "" if refusal or draw.blind else _digest(train, fraction, draw.seed)
    if digest and draw.earlier is not None and draw.earlier.digest == digest:
        draw.drawn = draw.earlier
        draw.progress("near-duplicates are those that were found before: no file has changed")
    else:
        lines: list[str] = []
        chosen, warnings = _drawn(train, fraction, draw, refusal, lines.append)
        draw.drawn = Drawn(digest, tuple(sorted(chosen)), tuple(lines), tuple(warnings))
    for line in draw.drawn.lines:
        say(line)
    val = set(draw.drawn.val)
    return {
        "train": [entry for entry in train if entry.id not in val],
        "val": [entry for entry in train if entry.id in val],
    }


def _digest(entries: list[Entry], fraction: float, seed: int) -> str:
    """Of the images, the sizes and times of their files, and the settings."""
    found = hashlib.sha256(repr((VERSION, near.RULES, fraction, seed)).encode())
    for entry, version in zip(entries, versions(entries), strict=True):
        found.update(repr((entry, version)).encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def _drawn(entries: list[Entry], fraction: float, draw: Draw, refusal: str, say: Say) -> tuple[set[int], list[str]]:
    """The ids of images for validation, and warnings. Of every class this fraction, at least one of two or more; the
    same ones whenever seed, fraction and files are the same. Files of a class with the same content stay together, and
    so do near-duplicates; a group of more than are wanted is for training. Where every class has one image, they are
    drawn from all of them: the classes that are drawn then have no training images."""
    twins, looks = _compared(entries, draw, refusal, say)
    alike = _near_duplicates(entries, looks, say) if looks is not None else {}
    chosen: set[int] = set()
    for label, positions in near.by_class(entries).items():
        groups: dict[str, list[Entry]] = defaultdict(list)
        for position in positions:
            entry = entries[position]
            groups[alike.get(entry.id) or twins.get(entry.id, f"alone {entry.id}")].append(entry)
        order = np.random.default_rng([draw.seed, label]).permutation(len(groups))
        wanted = max(1, round(fraction * len(positions))) if len(groups) > 1 else 0
        listed = list(groups.values())
        chosen |= {entry.id for entry in _taken([listed[number] for number in order], wanted)}
    if not chosen and len(entries) > 1:
        wanted = max(1, round(fraction * len(entries)))
        say(f"every class has one image: {wanted} of these are for validation, and their classes cannot be learned")
        order = np.random.default_rng(draw.seed).permutation(len(entries))[:wanted]
        chosen = {entries[number].id for number in order}
    return chosen, _across(entries, chosen, twins, looks, say)


def _compared(
    entries: list[Entry], draw: Draw, refusal: str, say: Say
) -> tuple[dict[int, str], list[near.Look | None] | None]:
    """Names of contents that several entries have, and how each entry looks, if that is looked at. Each is read once
    for both."""
    groups = same.of_one_size(entries)
    if refusal or draw.blind:
        say(refusal or f"near-duplicates are not looked for, because their look ended early: {draw.blind}")
        twins = same.contents(groups)
        if twins is None:
            say(f"copies of files are not looked for: {same.TOO_MUCH}")
        return twins or {}, None
    if len(entries) >= MANY:
        say(f"near-duplicates are looked for among {len(entries):,} images")
    wanted = {entry.id for group in groups for entry in group} | {
        entry.id for entry in entries if entry.row is not None
    }
    looks, digests = near.looks(entries, wanted, draw.progress)
    return same.named(digests), looks


def _across(
    entries: list[Entry], chosen: set[int], twins: dict[int, str], looks: list[near.Look | None] | None, say: Say
) -> list[str]:
    """Warnings of images that are in both parts: each class is drawn by itself, and an image may be in several."""
    train = [i for i, entry in enumerate(entries) if entry.id not in chosen]
    val = [i for i, entry in enumerate(entries) if entry.id in chosen]
    both = same.pairs([entries[i] for i in train], [entries[i] for i in val], twins)
    several = same.conflicts(entries, twins)
    if looks is None:
        return several + same.lines(both, [])
    labels = [entries[i].label for i in train], [entries[i].label for i in val]
    nearly = near.pairs([looks[i] for i in train], [looks[i] for i in val], labels)
    if nearly is None:
        say("near-duplicates in other classes are not looked for: the images are too much alike")
    return several + same.lines(
        both, [(entries[train[at]], entries[val[position]]) for position, at in (nearly or {}).items()]
    )


def _taken(groups: list[list[Entry]], wanted: int) -> list[Entry]:
    """About so many entries of the first groups, whole ones: a larger group only if there is no other. The last group
    is for training."""
    found: list[Entry] = []
    for group in groups[:-1]:
        if len(found) + len(group) <= wanted:
            found += group
    if wanted and not found:
        found = min(groups, key=len)
    return found


def _near_duplicates(entries: list[Entry], looks: list[near.Look | None], say: Say) -> dict[int, str]:
    """For entries that have near-duplicates in their class: a name of these. A line for what was or was not found."""
    names: dict[int, str] = {}
    alike, too_many = 0, 0  # classes
    for positions in near.by_class(entries).values():
        groups = near.groups([looks[position] for position in positions])
        if groups is None:
            too_many += 1
            continue
        if len(positions) > 1 and len(set(groups)) == 1:
            alike += 1
            continue
        size = Counter(groups)
        for position, group in zip(positions, groups, strict=True):
            if size[group] > 1:
                names[entries[position].id] = f"near {entries[positions[group]].id}"
    if names:
        say(f"{len(names)} images are near-duplicates of others of their class: each such group is on one side")
    if alike:
        classes = count_of(alike, "class", "classes")
        say(f"the images of {classes} are all near-duplicates of each other, and are drawn one by one")
    if too_many:
        classes = count_of(too_many, "class", "classes")
        say(f"the images of {classes} are too much alike for near-duplicates to be told, and are drawn one by one")
    if line := near.unseen(entries, looks):
        say(line)
    return names
