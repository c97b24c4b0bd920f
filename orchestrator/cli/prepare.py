"""Convert photographs to the shards that training reads, or check shards.

    python jobs/prepare.py --source PHOTOS --output SHARDS
    python jobs/prepare.py --check SHARDS

PHOTOS is a folder, a URI such as s3://BUCKET/FOLDER, or a zip or tar, with one of
    imagefolder  CLASS/IMAGE; or train/CLASS/IMAGE and val/CLASS/IMAGE, by any usual names of these folders, or a flat
                 val/ with ImageNet's devkit, LOC_val_solution.csv or val_annotations.txt
    table        images, and a table of their labels: labels.csv, metadata.csv or another (--labels)
    caffe        images, and train.txt and val.txt with lines PATH LABEL
    parquet      Parquet or Arrow files with columns of image bytes and labels, such as Hugging Face's
    webdataset   tars of KEY.jpg and KEY.cls
    ilsvrc       ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, as downloaded
    cifar10      cifar-10-python.tar.gz, or its folder
The format is detected and printed; --dry-run prints what is there and stops. Without a val part, a fifth of every class
is drawn for validation. Every image is converted to RGB, resized to a shorter side of 256 pixels, cropped to its
central 256x256 and stored as a JPEG in a Parquet shard. `--source digits` takes scikit-learn's 1,797 digits instead.

Bursts and copies of a photograph stay on one side of that draw. Classes and their rows are printed at the end, and
OUTPUT/classes.png has the mean image and some images of them.

Run an interrupted preparation again to resume it; the result is identical to the last byte.

--check verifies every shard's checksum, counts rows, classes and labels, has the feed decode and crop every image as
training would, prints images/s, and draws a contact sheet of augmented images. First it prints what was found in the
source.
"""

import argparse
import shlex
from pathlib import Path

from alexnet.images import WHITE
from orchestrator.base.environment import command
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine
from orchestrator.cli.flags import DEFAULT_RECIPE, Parser, fraction, natural, part, positive_int, run
from orchestrator.cluster.connection import connect
from orchestrator.config.recipes import RECIPES
from orchestrator.data import check as checking
from orchestrator.data import shards
from orchestrator.data.dataset import Dataset
from orchestrator.data.prepare import (
    JPEG_QUALITY,
    ROWS_PER_SHARD,
    check_apart,
    check_rejected,
    check_space,
    earlier_draw,
    prepare,
)
from orchestrator.data.sheet import draw_classes
from orchestrator.data.sources import FORMATS, Options
from orchestrator.data.sources.apart import open_apart
from orchestrator.data.view import CheckView, PrepareView, show_source

SMALLEST = 64  # pixels


def parser() -> Parser:
    flags = Parser("prepare", __doc__)
    flags.add_argument("--source", metavar="PHOTOS", help="folder, archive or URI of the images, or the word digits")
    flags.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        metavar="FORMAT",
        help=f"of --source: {', '.join(FORMATS)} (default: auto, which detects it)",
    )
    flags.add_argument(
        "--verify",
        action="store_true",
        help="first check archives against the published MD5 sums",
    )
    flags.add_argument(
        "--dry-run", action="store_true", help="print what is in --source and how it would be read; write nothing"
    )
    flags.add_argument("--labels", metavar="FILE", help="table of labels in --source: CSV, TSV or JSON lines")
    flags.add_argument("--image-column", metavar="NAME", help="of the table, or of Parquet files: the images")
    flags.add_argument("--label-column", metavar="NAME", help="of the table, or of Parquet files: the labels")
    flags.add_argument(
        "--label-pattern",
        metavar="REGEX",
        help="take the class from file names: the first group, as in '^(cat|dog)'",
    )
    flags.add_argument("--config", metavar="NAME", help="which of several sets in a folder of Parquet files")
    flags.add_argument(
        "--val-fraction",
        type=part,
        metavar="FRACTION",
        help="draw this part of every class for validation (default: 0.2 where there is no val part)",
    )
    flags.add_argument("--output", metavar="DIR", help="folder or URI for the shards; must not contain a data set yet")
    flags.add_argument("--check", metavar="DIR", help="check the shards in this folder instead")
    flags.add_argument(
        "--picture",
        metavar="FILE",
        type=Path,
        help="with --check: the contact sheet (default: contact_sheet.png in DIR; for a URI, in the current folder)",
    )
    flags.add_argument("--overwrite", action="store_true", help="replace the data set in --output")
    flags.add_argument(
        "--image-size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the stored images (default: 256, or 72 for images smaller than 64)",
    )
    flags.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of the global shuffle, and of what is drawn (default: 0)"
    )
    flags.add_argument(
        "--encoding",
        choices=shards.ENCODINGS,
        default="jpeg",
        metavar="ENCODING",
        help="jpeg: about 20 KB per 256-pixel image; raw: 197 KB, but no decoding during training (default: jpeg)",
    )
    flags.add_argument(
        "--jpeg-quality", type=positive_int, default=JPEG_QUALITY, metavar="N", help="1 to 100 (default: 90)"
    )
    flags.add_argument(
        "--rows-per-shard",
        type=positive_int,
        default=ROWS_PER_SHARD,
        metavar="N",
        help="images per file (default: 1024)",
    )
    flags.add_argument(
        "--max-rejected",
        type=fraction,
        default=0.01,
        metavar="FRACTION",
        help="tolerated share of unreadable files (default: 0.01)",
    )
    flags.add_argument(
        "--parallelism",
        type=positive_int,
        metavar="TASKS",
        help="shards to make at the same time (default: one per CPU)",
    )
    flags.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        metavar="RULE",
        help="apply or ignore the orientation that photographs state (default: apply, but not for ImageNet and CIFAR)",
    )
    flags.add_argument(
        "--background",
        type=colour,
        default=WHITE,
        metavar="R,G,B",
        help="colour, or its name, under transparent pixels (default: white)",
    )
    return flags


def colour(text: str) -> tuple[int, int, int]:
    """Of R,G,B or a name."""
    import PIL.ImageColor

    numbers = text.split(",")
    if len(numbers) == 3 and all(number.strip().isdecimal() and int(number) <= 255 for number in numbers):
        return int(numbers[0]), int(numbers[1]), int(numbers[2])
    try:
        found = PIL.ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour: give R,G,B of 0 to 255, or a name") from None
    return found[0], found[1], found[2]


def main(flags: Parser, args: argparse.Namespace) -> int:
    if args.check:
        if args.source or args.output:
            flags.error("--check: takes neither --source nor --output")
        return check(flags, args)
    if args.picture:
        flags.error("--picture: only --check draws one")
    wanted = ("source",) if args.dry_run else ("source", "output")
    missing = [f"--{name}" for name in wanted if getattr(args, name) is None]
    if missing:
        flags.error(f"the following arguments are required: {', '.join(missing)} (or --check DIR)")
    if args.image_size is not None and args.image_size < SMALLEST:
        flags.error(f"--image-size {args.image_size}: must be at least {SMALLEST}, the smallest input of the net")
    if args.jpeg_quality > 100:
        flags.error(f"--jpeg-quality {args.jpeg_quality}: must be between 1 and 100")
    line = LiveLine()
    try:
        if args.output:
            check_apart(args.source, StoragePath.of(args.output))
        if args.dry_run:
            source = open_apart(args.source, options_of(args), say=line.print)
            show_source(source, line)
            check_rejected(source, args.max_rejected)
            return 0
        output = StoragePath.of(args.output)
        if (output / shards.MANIFEST).size() is not None and not args.overwrite:
            flags.error(f"--output {output}: already contains a data set; choose another folder, or pass --overwrite")
        source = open_apart(args.source, options_of(args), say=line.print, earlier=earlier_draw(output))
        quality = args.jpeg_quality if args.encoding == "jpeg" else None
        check_rejected(source, args.max_rejected, output)
        check_space(source, output, args.image_size or source.image_size, quality, args.rows_per_shard)
    except ValueError as error:
        flags.error(str(error))
    show_source(source, line)
    view = PrepareView(output)
    connect()
    manifest = prepare(
        source,
        output,
        image_size=args.image_size,
        seed=args.seed,
        encoding=args.encoding,
        jpeg_quality=args.jpeg_quality,
        rows_per_shard=args.rows_per_shard,
        max_rejected=args.max_rejected,
        parallelism=args.parallelism,
        exif=args.exif,
        background=args.background,
        on_progress=view.progress,
    )
    view.finished(manifest, training_command(manifest, output), draw_classes(output, manifest))
    return 0


def options_of(args: argparse.Namespace) -> Options:
    """What the flags state about the source."""
    return Options(
        format=args.format, verify=args.verify, labels=args.labels, image_column=args.image_column,
        label_column=args.label_column, label_pattern=args.label_pattern, config=args.config,
        val_fraction=args.val_fraction, seed=args.seed,
    )  # fmt: skip


def training_command(manifest: shards.Manifest, output: StoragePath) -> str:
    """A command that trains on these shards; its settings are checked as a run would check them. Where they do not go
    together, the reason."""
    recipe = "imagenette" if manifest.image_size >= 224 else DEFAULT_RECIPE
    config, flags = RECIPES[recipe]().changed(data=str(output)), [] if recipe == DEFAULT_RECIPE else [recipe]
    flags += ["--data", shlex.quote(str(output))]
    rows = manifest.rows["train"]
    if config.global_batch_size > rows:
        config = config.changed(global_batch_size=2 ** (rows.bit_length() - 1))
        flags += ["--global-batch-size", str(config.global_batch_size)]
    try:
        Dataset(config, output, verify=False)
    except (ValueError, shards.DamagedData) as error:  # the shards are written all the same
        return f"(no command is known to fit these data: {error})"
    return " ".join([command("train"), *flags])


def check(flags: Parser, args: argparse.Namespace) -> int:
    try:
        folder = StoragePath.of(args.check)
        manifest = shards.read_manifest(folder)
    except ValueError as error:
        flags.error(str(error).replace("--data", "--check"))
    view = CheckView()
    view.begin(manifest)
    connect()
    picture = args.picture or (folder.local or Path.cwd()) / shards.SHEETS[1]
    view.finished(checking.check(folder, view.line.print, view.progress), picture)
    return 0


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
