"""Other labels for the same images (--labels): a list of the valid classes of each image.

Two forms of JSON: a list of lists by the image's number, as ReaL has them for ImageNet (Beyer et al., 2020), or an
object from the image's name to its list.
"""

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.base.schema import load_json
from orchestrator.base.shown import quoted, shown
from orchestrator.base.storage import StoragePath
from orchestrator.models.shard_rows import Rows

NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")  # whose numbers begin with 1


def read_label_sets(file: str, rows: Rows, classes: tuple[str, ...]) -> NDArray[np.bool_]:
    """(N, K): which classes are valid for each row; none for an image that is to be left out.

    A label is a class's name or its number. Raises ValueError of one line.
    """
    place = StoragePath.of(file)
    try:
        document = load_json(place.read())
    except OSError as error:
        raise ValueError(f"--labels {file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--labels {file}: is not JSON ({shown(error, 80)})") from None
    if isinstance(document, list):
        lists = [document[number] for number in _numbers(file, rows.names, len(document))]
    elif isinstance(document, dict):
        lists = _by_name(file, rows.names, document)
    else:
        raise ValueError(f"--labels {file}: expected a list of lists of labels, or an object from names to lists")
    number_of = {name: number for number, name in enumerate(classes)}
    valid = np.zeros((len(rows), len(classes)), np.bool_)
    for row, labels in enumerate(lists):
        if not isinstance(labels, list):
            raise ValueError(f"--labels {file}: {rows.names[row]} has {quoted(labels)}; expected a list of labels")
        for label in labels:
            number = number_of.get(label) if isinstance(label, str) else label
            if type(number) is not int or not 0 <= number < len(classes):
                known = f"a class's name, such as {quoted(classes[0])}, or its number, below {len(classes)}"
                raise ValueError(f"--labels {file}: {rows.names[row]} has the label {quoted(label)}; expected {known}")
            valid[row, number] = True
    if not valid.any():
        raise ValueError(f"--labels {file}: has no label for any image")
    return valid


def _numbers(file: str, names: list[str], length: int) -> list[int]:
    """The place of each image in a list: by the number in the name of ImageNet's validation images; else among all
    images sorted by the names of their files, or by the whole names where those are not unique."""
    found = [NUMBERED.fullmatch(PurePosixPath(name).name) for name in names]
    if all(found):
        numbers = [int(match[1]) - 1 for match in found if match]
        if min(numbers) < 0 or max(numbers) >= length:
            raise ValueError(
                f"--labels {file}: has {length} entries, from 1, but there is an image "
                f"{(min if min(numbers) < 0 else max)(numbers) + 1}"
            )
        return numbers
    if length != len(names):
        raise ValueError(f"--labels {file}: has {length} entries for {len(names)} images")
    keys = [PurePosixPath(name).name for name in names]
    if len(set(keys)) < len(keys):
        keys = names
    places = [0] * len(names)
    for place, row in enumerate(sorted(range(len(names)), key=lambda row: keys[row])):
        places[row] = place
    return places


def _by_name(file: str, names: list[str], document: dict[str, Any]) -> list[Any]:
    ends = Counter(PurePosixPath(name).name for name in names)
    lists: list[Any] = []
    for name in names:
        end = PurePosixPath(name).name
        key = name if name in document or ends[end] > 1 else end
        if key not in document:
            raise ValueError(f"--labels {file}: has no labels of {quoted(name)}; give an empty list to leave it out")
        lists.append(document[key])
    return lists
