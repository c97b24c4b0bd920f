"""What MLflow runs to serve a trained net; stored as text with the model, beside a copy of alexnet/.

    model = mlflow.pyfunc.load_model("runs:/RUN_ID/model")
    model.predict([Path("cat.jpg").read_bytes()])                       # a table: class, probability, top
    model.predict(images, params={"probabilities": True})               # (N, classes) float32

The model has no input schema: MLflow's would admit either arrays or bytes, and turns arrays of four dimensions down
where there are columns. `pictures_of` says what is taken, and refuses the rest in one line, over HTTP with status 400.
"""

import base64
import binascii
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from numpy.typing import NDArray

import alexnet
from alexnet import images
from alexnet.images_apart import ApartDecoder

COLUMNS = ("image", "bytes")  # of tables and records, that hold a picture
BATCH = 32  # images at a time
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
TAKES = "give the bytes of image files, in JSON as base64, or uint8 arrays (N, H, W, 3)"

Pictures = Sequence[Any] | NDArray[Any]


class Refused(mlflow.MlflowException, ValueError):  # type: ignore[misc]
    """An input that is no picture, or a parameter out of range. MLflow's server answers it with status 400."""

    def __init__(self, text: str) -> None:
        self._line = " ".join(text.split())[:500]
        super().__init__(self._line, error_code=INVALID_PARAMETER_VALUE)  # type: ignore[call-arg]

    @property
    def message(self) -> str:
        return self._line

    @message.setter
    def message(self, text: str) -> None:
        """The server would put all of the input, such as megabytes of base64, before the reason."""


def pictures_of(data: Any) -> Pictures:
    """The pictures of an input, each as `Classifier.stored` takes it. Raises Refused.

    data: the bytes of an image file, a text (base64, or the name of a file), an array (H, W, 3); several of those in a
    list, a Series or an array (N, H, W, 3); a table or records with a column `image`.
    """
    if isinstance(data, pd.DataFrame):
        named = [name for name in COLUMNS if name in data.columns]
        if not named and len(data.columns) != 1:
            raise Refused(f"columns {', '.join(map(str, data.columns[:9]))}: the pictures are in a column `image`")
        return list(data[named[0] if named else data.columns[0]])
    if isinstance(data, dict):
        return pictures_of(_field(data))
    if isinstance(data, bytes | str | Path):
        return [data]
    if isinstance(data, pd.Series):
        return list(data)
    if isinstance(data, list | tuple):
        return [_field(each) if isinstance(each, dict) else each for each in data]
    if not isinstance(data, np.ndarray):
        raise Refused(f"an input of type {type(data).__name__}: {TAKES}")
    if data.dtype.kind in "UO":  # texts of JSON, or objects
        return [_field(each) if isinstance(each, dict) else each for each in data.ravel().tolist()]
    if data.ndim == 3:
        return [data]
    if data.ndim != 4:
        raise Refused(f"an array of shape {data.shape} and type {data.dtype}: {TAKES}")
    return data


def _field(record: dict[str, Any]) -> Any:
    found = next((record[name] for name in COLUMNS if record.get(name) is not None), None)
    if found is None:
        raise Refused(f"fields {', '.join(map(str, [*record][:9])) or 'none'}: a picture is in the field `image`")
    return _field(found) if isinstance(found, dict) else found  # Hugging Face: {"image": {"bytes": ...}}


class Classifier:
    """From pictures to the best classes, or to the probabilities of all."""

    decoder = ApartDecoder()  # strangers' images take no more time and memory than they may

    def load_context(self, context: Any) -> None:
        """context.model_config["files"]: whether a text is the name of a file. Only who loads the model sets it; what
        comes over HTTP cannot, and a server reads no files that its clients name."""
        self.trained = alexnet.load(context.artifacts["net"])
        self.reads_files = bool((context.model_config or {}).get("files"))
        self.lock = threading.Lock()  # a net uses all cores; a server's requests would share them

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """A table with a row for each picture: class, probability, and top, a list of the best classes; class_name,
        too, where the data has words for its classes.

        params: top (how many), views (1: the centre crop, or 10, as in the paper), probabilities (return those of all
        classes instead, (N, classes) float32). Raises Refused.
        """
        chosen = {"top": 5, "views": 1, "probabilities": False} | (params or {})
        if chosen["views"] not in (1, 10):
            raise Refused(f"views = {chosen['views']}: 1 or 10")
        if chosen["top"] < 1:
            raise Refused(f"top = {chosen['top']}: at least 1")
        pictures = pictures_of(model_input)
        parts = [np.empty((0, self.trained.net.num_classes), np.float32)]
        with self.lock:
            parts += [self.trained.probabilities(batch, chosen["views"]) for batch in self._batches(pictures)]
        found = np.concatenate(parts)
        return found if chosen["probabilities"] else self._table(found, chosen["top"])

    def _batches(self, pictures: Pictures) -> Iterator[NDArray[np.uint8]]:
        for first in range(0, len(pictures), BATCH):
            part = pictures[first : first + BATCH]
            yield np.stack([self.stored(each, first + i, len(pictures)) for i, each in enumerate(part)])

    def stored(self, picture: Any, index: int, number: int) -> NDArray[np.uint8]:
        """A picture at the side at which the net's images are stored. Raises Refused, which says which it is."""
        try:
            if isinstance(picture, np.ndarray) and picture.ndim == 0:
                picture = picture.item()  # a text of JSON
            if isinstance(picture, str | Path):
                picture = self._bytes_of(picture)
            if isinstance(picture, bytes | bytearray | memoryview):
                if len(picture) > images.MAX_FILE_BYTES:
                    raise ValueError(f"{len(picture)} bytes, at most {images.MAX_FILE_BYTES} are read")
                decoded = self.decoder.decode(bytes(picture), exif=self.trained.description.applies_exif)
                return images.resize_and_center(decoded, self.trained.image_size)
            return self._resized(np.asarray(picture))
        except ValueError as error:  # images.NotAnImage is one
            where = "" if number == 1 else f"image {index + 1} of {number}: "
            raise Refused(f"{where}{error}") from None

    def _resized(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise ValueError(f"an array of shape {pixels.shape} and type {pixels.dtype}: {TAKES}")
        if pixels.shape[0] * pixels.shape[1] > images.MAX_PIXELS:
            raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, at most {images.MAX_PIXELS} are read")
        if pixels.dtype != np.uint8:  # numbers of JSON
            if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
                raise ValueError(f"an array of {pixels.dtype}: pixels are whole numbers from 0 to 255")
            pixels = pixels.astype(np.uint8)
        return images.resize_and_center(pixels, self.trained.image_size)

    def _bytes_of(self, text: str | Path) -> bytes:
        """Raises ValueError."""
        if self.reads_files:
            try:
                size = Path(text).stat().st_size
                if size > images.MAX_FILE_BYTES:
                    raise ValueError(f"{text}: {size} bytes, at most {images.MAX_FILE_BYTES} are read")
                return Path(text).read_bytes()
            except OSError as error:
                raise ValueError(f"{text}: {error.strerror}") from None
        if isinstance(text, Path):
            raise ValueError('files are read by a model that was loaded with model_config={"files": True}')
        if len(text) > 2 * images.MAX_FILE_BYTES:
            raise ValueError(f"{len(text)} characters of base64, at most {2 * images.MAX_FILE_BYTES} are read")
        try:
            return base64.b64decode("".join(DATA_URI.sub("", text, count=1).split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"a text that is not base64, {text[:20]!r}: {TAKES}") from None

    def _table(self, probabilities: NDArray[np.float32], top: int) -> pd.DataFrame:
        classes, words = self.trained.classes, self.trained.description.class_names
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]

        def named(row: int, label: int) -> dict[str, Any]:
            found: dict[str, Any] = {"class": classes[label]}
            if words:
                found["class_name"] = words[label] if label < len(words) else classes[label]
            return found | {"probability": float(probabilities[row, label])}

        rows = [[named(row, label) for label in labels] for row, labels in enumerate(best.tolist())]
        columns = ["class", *(["class_name"] if words else []), "probability", "top"]
        return pd.DataFrame([each[0] | {"top": each} for each in rows], columns=columns)


class Served(Classifier, mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Inherits `predict`: MLflow advises type hints where it sees a class define one, and takes them for a schema."""


mlflow.models.set_model(Served())
