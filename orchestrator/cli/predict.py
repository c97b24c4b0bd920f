"""Predict the classes of images with a trained net: without labels, shards or training data.

    python jobs/predict.py RUN --source photo.jpg
    python jobs/predict.py RUN --source PHOTOS --output predictions.parquet
    python jobs/predict.py models:/alexnet@champion --source 's3://BUCKET/FOLDER' --output predictions.jsonl

WHAT is an image, a folder with all that is below it, a pattern such as 'photos/**/*.jpg', a zip or tar, a Parquet or
Arrow file with a column of image bytes, or a URI of one of these. MODEL is the name of a run or a search, its folder, a
checkpoint, runs:/RUN_ID/model or models:/NAME@ALIAS in MLflow. Images that cannot be read are listed in
FILE.rejected.jsonl; exit status 1 only if none could be.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pyarrow as pa

from alexnet.trained import TrainedNet
from orchestrator.base.environment import default_output
from orchestrator.base.exits import JobError
from orchestrator.base.shown import count_of
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine, bar, columns, duration, percent
from orchestrator.cli.evaluate import add_engine, settings_of
from orchestrator.cli.flags import Parser, positive_int, run
from orchestrator.cluster.connection import connect
from orchestrator.models.engine import needs_ray
from orchestrator.models.find import find_models
from orchestrator.models.predict import Found, find_images, predict
from orchestrator.models.row_file import RowFile, check_form

TOP = 5
SHOWN = 100  # images at most on the terminal
SCHEMA = pa.schema(
    [("name", pa.string()), ("classes", pa.list_(pa.string())), ("probabilities", pa.list_(pa.float32()))]
)


def parser() -> Parser:
    flags = Parser("predict", __doc__)
    flags.add_argument("model", metavar="MODEL", help="a trained net")
    flags.add_argument("--source", required=True, metavar="WHAT", help="the images")
    flags.add_argument("--output", metavar="FILE", help="predictions: FILE.parquet, FILE.csv or FILE.jsonl "
                       "(default: a table on the terminal)")  # fmt: skip
    flags.add_argument("--overwrite", action="store_true", help="replace --output")
    flags.add_argument(
        "--top", type=positive_int, metavar="K", help="classes of an image (default: 5, or all of fewer)"
    )
    flags.add_argument("--exif", choices=("apply", "ignore"), help="the orientation that photographs state (default: "
                       "as the images were that the net was trained on)")  # fmt: skip
    add_engine(flags)
    return flags


def main(flags: Parser, args: argparse.Namespace) -> int:
    line = LiveLine()
    with tempfile.TemporaryDirectory(prefix="models-") as into:
        try:
            output = StoragePath.of(args.output) if args.output else None
            if output is not None:
                check_form(output)
                if output.size() is not None and not args.overwrite:
                    raise ValueError(f"--output {output}: is already there; choose another name, or pass --overwrite")
            [model] = find_models([args.model], Path(into), default_output())
            trained = model.load()
            if args.top and args.top > trained.net.num_classes:
                raise ValueError(f"--top {args.top}: the model has {trained.net.num_classes} classes")
            args.top = args.top or min(TOP, trained.net.num_classes)
            found = find_images(args.source)
            if output is None and found.total > SHOWN:
                raise ValueError(f"--source {args.source}: has {found.total} images, more than a table shows; give "
                                 "--output FILE.parquet, FILE.csv or FILE.jsonl")  # fmt: skip
        except ValueError as error:
            flags.error(str(error))
        if needs_ray(args.workers):
            connect()
        if output is None:
            show(trained, found, args, line)
        else:
            write(trained, found, args, output, line)
    return 0


def write(trained: TrainedNet, found: Found, args: argparse.Namespace, output: StoragePath, line: LiveLine) -> None:
    """Predictions to a file, and beside it the images that could not be read."""
    rejected_file = output.parent / f"{output.name}.rejected.jsonl"
    rejected_schema = pa.schema([("name", pa.string()), ("reason", pa.string())])
    good = bad = 0

    def progress(done: int, total: int, seconds: float) -> None:
        speed = done / max(seconds, 1e-9)
        left = duration((total - done) / speed)
        line.update(f"{bar(done / total)} {done}/{total} images, {speed:.0f} images/s, {left} left")

    with RowFile(output, SCHEMA) as kept, RowFile(rejected_file, rejected_schema) as refused:
        for part in predict(trained, found, settings_of(args), top=args.top, exif=turns(trained, args.exif),
                            num_workers=args.workers, progress=progress):  # fmt: skip
            good, bad = good + len(part.names), bad + len(part.rejected)
            if part.names:
                kept.write(part.columns())
            if part.rejected:
                names, reasons = zip(*part.rejected, strict=True)
                refused.write({"name": names, "reason": reasons})
                first = part.rejected[0]
        if not good:
            raise JobError(f"--source {args.source}: none of its {bad} images could be read: {first[0]}: {first[1]}")
    if not bad:
        rejected_file.remove()
    line.print(f"{good} predictions in {output}{_rest(found, bad, f', listed in {rejected_file}')}")


def show(trained: TrainedNet, found: Found, args: argparse.Namespace, line: LiveLine) -> None:
    """Predictions as a table."""
    rows: list[list[str]] = []
    rejected: list[tuple[str, str]] = []
    for part in predict(trained, found, settings_of(args), top=args.top, exif=turns(trained, args.exif),
                        num_workers=args.workers):  # fmt: skip
        for name, classes, probabilities in zip(part.names, part.classes, part.probabilities, strict=True):
            guesses = zip(classes, probabilities, strict=True)
            rows.append([name, *(f"{word} {percent(probability)}" for word, probability in guesses)])
        rejected += part.rejected
    if not rows:
        name, reason = rejected[0]
        raise JobError(f"--source {args.source}: none of its {len(rejected)} images could be read: {name}: {reason}")
    line.print(*columns(["image", *(str(number + 1) for number in range(args.top))], rows))
    for name, reason in rejected:
        print(f"warning: {json.dumps(name)}: cannot be read: {json.dumps(reason)}", file=sys.stderr)
    if rest := _rest(found, len(rejected), ""):
        line.print(rest.lstrip(", "))


def turns(trained: TrainedNet, asked: str | None) -> bool:
    """Whether images are turned by their EXIF orientation: as asked, or as those that the net was trained on."""
    if asked is not None:
        return asked == "apply"
    return trained.description.applies_exif


def _rest(found: Found, bad: int, where: str) -> str:
    unread = f", {bad} could not be read{where}" if bad else ""
    others = f", {count_of(found.left_out, 'file')} left out: no images by their names, or links"
    return unread + (others if found.left_out else "")


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
