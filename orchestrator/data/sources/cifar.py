"""CIFAR-10 in its "python version": pickles, read by an unpickler that knows only arrays."""

import io
import json
import pickle
from typing import Any

import numpy as np

from orchestrator.base.storage import StoragePath
from orchestrator.data import sandbox
from orchestrator.data.sources.devkit import AGAIN, read_small_archive
from orchestrator.data.sources.listing import STORED_SMALL, Entry, Say, Source, small_images

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
META = "batches.meta"
TRAIN, VAL = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)
SIDE = 32  # pixels
CUT_OFF = ("pickle data was truncated", "EOFError")  # errors of a pickle that ends too soon

# all that the real files name: an array of bytes and its type. A pickle that names anything else is refused.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def open_cifar10(root: StoragePath, say: Say = lambda line: None) -> Source:
    """The archive as downloaded, or its folder. Raises ValueError naming the file that is missing or damaged."""
    names = {*TRAIN, *VAL, META}
    folder = next((f for f in (root, root / FOLDER) if (f / TRAIN[0]).size()), None)
    if folder is not None:
        files = {name: (folder / name).read() for name in names if (folder / name).size() is not None}
        where = folder
    else:
        where = root if root.name == ARCHIVE else root / ARCHIVE
        if where.size() is None:
            where, files = root / FOLDER if (root / FOLDER).is_folder() else root, {}
        else:
            files = read_small_archive(where, names)
    missing = sorted(names - files.keys(), key=lambda name: (name != TRAIN[0], name))
    if missing:
        raise ValueError(f"--source {root}: {where} has no {missing[0]}; expected {FOLDER}/ or {ARCHIVE}")
    meta = _read(files[META], where / META, "label_names")
    classes = tuple(_text(name) for name in meta["label_names"])
    splits: dict[str, list[Entry]] = {"train": [], "val": []}
    next_id = 0
    for split, batches in (("train", TRAIN), ("val", VAL)):
        for batch in batches:
            content = _read(files[batch], where / batch, "data", "labels")
            pixels, labels = np.asarray(content["data"]), content["labels"]
            if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape != (len(labels), 3 * SIDE**2):
                raise ValueError(
                    f"{where / batch}: holds {pixels.dtype} of shape {pixels.shape}, not rows of {3 * SIDE**2} bytes"
                )
            if labels and not 0 <= min(labels) <= max(labels) < len(classes):
                raise ValueError(f"{where / batch}: has a label outside 0 to {len(classes) - 1}")
            images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
            shown = content.get("filenames") or [f"{batch}-{i:05d}" for i in range(len(labels))]
            for image, label, name in zip(images, labels, shown, strict=True):
                data = b"P6 %d %d 255\n" % (SIDE, SIDE) + image.tobytes()  # PPM: a line, then the pixels
                splits[split].append(Entry(next_id, int(label), f"{split}/{_text(name)}", data=data))
                next_id += 1
    say(small_images(SIDE))
    return Source("cifar10", "cifar10", classes, splits, image_size=STORED_SMALL)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no CIFAR batch does")
        return super().find_class(module, name)


def _read(data: bytes, where: StoragePath, *wanted: str) -> dict[str, Any]:
    """What a file holds of what is wanted: pixels as an array, the rest as lists. Raises ValueError."""
    try:
        found = sandbox.run(_content, data)
        head, _, pixels = found.partition(b"\n")
        content: dict[str, Any] = json.loads(head)
        if "shape" in content:
            content["data"] = np.frombuffer(pixels, content["dtype"]).reshape(content["shape"])
        missing = [key for key in wanted if key not in content]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        return content
    except ValueError as error:
        what = str(error).removeprefix("UnpicklingError: ")
        again = AGAIN if what.startswith(CUT_OFF) else ""
        raise ValueError(f"{where}: is not a batch of CIFAR-10: {what}{again}") from None


def _content(data: bytes) -> bytes:
    """A pickle's content as a line of JSON and the bytes of its array; run in the sandbox."""
    content = {_text(key): value for key, value in _Unpickler(io.BytesIO(data), encoding="bytes").load().items()}
    found: dict[str, Any] = {}
    for key in ("label_names", "filenames"):
        if key in content:
            found[key] = [_text(value) for value in content[key]]
    if "labels" in content:
        found["labels"] = [int(label) for label in content["labels"]]
    pixels = np.asarray(content.get("data", np.zeros(0, np.uint8)))
    if "data" in content and pixels.dtype.kind in "uifb":
        found |= {"shape": pixels.shape, "dtype": str(pixels.dtype)}
    return json.dumps(found).encode() + b"\n" + (pixels.tobytes() if "shape" in found else b"")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
