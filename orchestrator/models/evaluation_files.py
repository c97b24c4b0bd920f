"""What an evaluation leaves (docs/formats.md): evaluation.json, predictions.parquet, pictures, and values in MLflow."""

import hashlib
import io
import json
import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alexnet.pictures import confusion_matrix, reliability_diagram
from orchestrator.base.storage import StoragePath
from orchestrator.models.engine import Settings
from orchestrator.models.evaluate import Data, Evaluation, Result
from orchestrator.models.row_file import RowFile

EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.parquet"
VERSION = 1  # of EVALUATION
PREDICTION_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("name", pa.string()),
        ("label", pa.int32()),
        ("classes", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
    ]
)
# of the nets of the paper and of Caffe, ILSVRC-2012 validation: (what, views, top-1 error, top-5 error)
PUBLISHED = (
    ("Krizhevsky et al. 2012, one net", 10, 0.407, 0.182),
    ("Krizhevsky et al. 2012, five nets", 10, 0.381, 0.164),
    ("Caffe's AlexNet", 1, 0.429, 0.198),
    ("torchvision's AlexNet (one column, no LRN)", 1, 0.4348, 0.2093),
)


class Predictions:
    """Writes predictions.parquet while an evaluation goes on; used in a `with` block."""

    def __init__(self, output: StoragePath, data: Data, outputs: tuple[str, ...]) -> None:
        self.rows, self.outputs = data.rows, np.array(outputs, object)
        self.file = RowFile(output / PREDICTIONS, PREDICTION_SCHEMA)

    def keep(self, rows: NDArray[np.int64], classes: NDArray[np.int64], probabilities: NDArray[np.float32]) -> None:
        """Rows of the data with their likeliest classes."""
        self.file.write(
            {
                "id": self.rows.ids[rows],
                "name": [self.rows.names[row] for row in rows],
                "label": self.rows.labels[rows].astype(np.int32),
                "classes": self.outputs[classes].tolist(),
                "probabilities": list(probabilities),
            }
        )

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)


def as_json(done: Evaluation, data: Data, labels: str | None) -> dict[str, Any]:
    """evaluation.json. labels: the file of other labels, if there was one."""
    return {
        "schema_version": VERSION,
        "data": str(data.folder),
        "digest": data.manifest.digest,
        "split": data.split,
        "labels": labels,
        "left_out": done.left_out,
        "images_per_s": done.images_per_s,
        "models": [result.as_json() for result in done.models],
        "ensemble": done.ensemble.as_json() if done.ensemble else None,
        "comparisons": [
            {"first": first, "second": second, "num_images": found.num_images,
             "only_first_wrong": found.only_first_wrong, "only_second_wrong": found.only_second_wrong,
             "difference": found.difference, "interval": list(found.interval), "p_value": found.p_value}
            for first, second, found in done.comparisons
        ],
        "published": [dict(zip(("what", "views", "top1_error", "top5_error"), row, strict=True))
                      for row in published(data, labels)],
    }  # fmt: skip


def published(data: Data, labels: str | None) -> tuple[tuple[str, int, float, float], ...]:
    """Published figures, where they are of the same task and labels."""
    return PUBLISHED if data.is_imagenet and data.split == "val" and labels is None else ()


def pictures(result: Result, *, several: bool) -> dict[str, Any]:
    """Figures of a model, by their files' names, which name the model if there are several."""
    mark = f"-{result.name}" if several else ""
    error = f"{result.name}: top-1 error {100 * result.top1_error:.2f} % of {len(result.wrong)} images"
    return {
        f"confusion{mark}.png": confusion_matrix(result.confusion(), result.outputs, error),
        f"reliability{mark}.png": reliability_diagram(
            result.calibration.bins, f"{result.name}: calibration error {100 * result.calibration.ece:.2f} %"
        ),
    }


def variant(settings: Settings, data: Data, trained_on: str | None, labels: str | None) -> tuple[str, ...]:
    """What sets an evaluation apart from the plain one of its model, for the names of files and of metrics: nothing of
    that with the centre crop on the validation images of the data that it was trained on.

    trained_on: the digest of that data, None where it is not known; labels: the file of other labels.
    """
    parts = [] if data.split == "val" else [data.split]
    if settings.views != 1:
        parts.append(f"{settings.views}crop")
    if settings.precision != "fp32":
        parts.append(settings.precision)
    if trained_on and data.manifest.digest != trained_on:
        parts.append(f"data-{data.manifest.digest[:8]}")
    if labels:
        digest = hashlib.sha256(StoragePath.of(labels).read()).hexdigest()
        parts.append(f"labels-{plain_name(PurePosixPath(labels.partition('?')[0]).stem)}-{digest[:8]}")
    return tuple(parts)


def plain_name(text: str) -> str:
    """Text as a part of a file's name, or of a metric's."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-") or "model"
    return plain if len(plain) <= 60 else f"{plain[:51]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def picture_files(result: Result, *, several: bool) -> dict[str, bytes]:
    """`pictures` as PNG."""
    found = {}
    for name, figure in pictures(result, several=several).items():
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120)
        found[name] = out.getvalue()
    return found


def to_text(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1) + "\n"


def write(done: Evaluation, data: Data, output: StoragePath, labels: str | None) -> list[str]:
    """Write evaluation.json and the pictures; returns the files' names."""
    names = []
    for result in done.results:
        for name, picture in picture_files(result, several=len(done.results) > 1).items():
            (output / name).write(picture)
            names.append(name)
    (output / EVALUATION).write(to_text(as_json(done, data, labels)).encode())
    return [EVALUATION, PREDICTIONS, *names]


def metric_names(result: Result, what: tuple[str, ...]) -> dict[str, float]:
    """What MLflow is told: eval/top1_error, or eval/train_top1_error_10crop of another split and of ten views.

    what: the `variant`.
    """
    of_split = what[:1] == ("train",)
    prefix = "eval/train_" if of_split else "eval/"
    suffix = "".join(f"_{part}" for part in what[of_split:])
    values = {"loss": result.loss, "top1_error": result.top1_error, "ece": result.calibration.ece}
    if result.top5_error is not None:
        values["top5_error"] = result.top5_error
    return {f"{prefix}{name}{suffix}": value for name, value in values.items()}
