"""Which part of a source is for training and which for validation: by the names of folders and files."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from orchestrator.base.shown import count_of
from orchestrator.data.sources.draw import Draw, with_val_drawn
from orchestrator.data.sources.listing import Entry, Say

WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# a word by itself: train, Training, train2017, seg_train, training_set, imagenet-val-0001.tar; not values or trainers
IN_NAME = {
    split: re.compile(rf"(?:^|[^a-z])(?:{'|'.join(words)})(?![a-z])", re.IGNORECASE) for split, words in WORDS.items()
}


def split_of_name(name: str) -> str | None:
    """train, val or test, by one part of a path; None if it says nothing."""
    return next((split for split, pattern in IN_NAME.items() if pattern.search(name)), None)


def split_of_path(path: str) -> str | None:
    """By the last part of a path that says one."""
    return next((split for part in reversed(PurePosixPath(path).parts) if (split := split_of_name(part))), None)


def into_two(
    parts: Mapping[str, list[Entry]],
    say: Say,
    draw: Draw,
    left_out: list[tuple[str, str]],
) -> dict[str, list[Entry]]:
    """Images of the parts train, val, test and "", which is none of them, as train and val. What belongs to neither is
    said and added to `left_out`."""
    train, val, test = [*parts["train"], *parts[""]], parts["val"], parts["test"]
    if not val and test and draw.fraction is None:
        say(f"the test part ({count_of(len(test), 'image')}) is used as val: there is no other")
        val, test = test, []
    unused = [*val, *test] if draw.fraction is not None else test
    if unused:
        rule = "a part that is neither for training nor for validation"
        are = count_of(len(unused), "image is", "images are")
        say(f"{are} left out, such as {unused[0].name}: {rule}")
        left_out += [(entry.name, rule) for entry in unused]
    if val and draw.fraction is None:
        return {"train": train, "val": val}
    return with_val_drawn(train, say, draw)


def renumbered(splits: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """With ids from 0 on, train first."""
    numbers = iter(range(sum(map(len, splits.values()))))
    return {split: [replace(entry, id=next(numbers)) for entry in splits[split]] for split in ("train", "val")}
