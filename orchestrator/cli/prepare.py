"""Turn photographs into shards that training reads, or check shards.

    python jobs/prepare.py --source PHOTOS --output SHARDS
    python jobs/prepare.py --check SHARDS

PHOTOS is a folder, or a URI such as s3://BUCKET/FOLDER, with one of
    imagefolder  train/CLASS/IMAGE and val/CLASS/IMAGE, or a flat val/ with ImageNet's devkit or LOC_val_solution.csv
    ilsvrc       ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, as downloaded
    parquet      train*.parquet and val*, validation* or test*.parquet, with columns of image bytes and labels
    cifar10      cifar-10-python.tar.gz, or its folder
What it is, is found out and said. Every image becomes RGB, its shorter side 256 pixels, its centre 256x256, a JPEG in a
Parquet shard. `--source digits` takes the 1,797 digits that scikit-learn ships instead.

A preparation that was interrupted goes on when it is started again, and ends with the same bytes.

--check holds every shard against its checksum, counts rows, classes and labels, has the feed decode and cut every image
as training would, prints images/s, and draws a contact sheet of augmented images.
"""

import argparse
from pathlib import Path

from orchestrator.base.exits import run_job
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine
from orchestrator.cli.flags import Parser, fraction, natural, positive_int
from orchestrator.cluster.connection import connect
from orchestrator.data import check as checking
from orchestrator.data import shards
from orchestrator.data.prepare import JPEG_QUALITY, ROWS_PER_SHARD, check_apart, check_space, prepare
from orchestrator.data.sources import FORMATS, open_source
from orchestrator.data.view import CheckView, PrepareView

SMALLEST = 64  # pixels


def parser() -> Parser:
    flags = Parser("prepare.py", __doc__)
    flags.add_argument("--source", metavar="DIR", help="folder or URI of images, or the word digits")
    flags.add_argument(
        "--format", choices=("auto", *FORMATS), default="auto", help="of --source (default: auto, found out)"
    )
    flags.add_argument(
        "--verify", action="store_true", help="first hold the archives against the MD5 sums that ImageNet publishes"
    )
    flags.add_argument("--output", metavar="DIR", help="folder or URI for the shards; must not hold a data set yet")
    flags.add_argument("--check", metavar="DIR", help="check the shards in this folder instead")
    flags.add_argument(
        "--picture",
        metavar="FILE",
        type=Path,
        help="of --check: the contact sheet (default: contact_sheet.png, in DIR or, of a URI, here)",
    )
    flags.add_argument("--overwrite", action="store_true", help="replace the data set that --output holds")
    flags.add_argument(
        "--image-size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the stored images (default: 256; of images below 64 pixels 72)",
    )
    flags.add_argument("--seed", type=natural, default=0, help="of the one global shuffle (default: 0)")
    flags.add_argument(
        "--encoding",
        choices=shards.ENCODINGS,
        default="jpeg",
        help="jpeg: about 20 KB an image of 256 pixels; raw: 197 KB, and no decoding in training (default: jpeg)",
    )
    flags.add_argument("--jpeg-quality", type=positive_int, default=JPEG_QUALITY, help="1 to 100 (default: 90)")
    flags.add_argument(
        "--rows-per-shard", type=positive_int, default=ROWS_PER_SHARD, help="images in a file (default: 1024)"
    )
    flags.add_argument(
        "--max-rejected",
        type=fraction,
        default=0.01,
        metavar="FRACTION",
        help="of files that may be unreadable (default: 0.01)",
    )
    flags.add_argument(
        "--parallelism", type=positive_int, metavar="TASKS", help="shards made at a time (default: as many as CPUs)"
    )
    return flags


def main() -> int:
    flags = parser()
    args = flags.parse_args()
    if args.check:
        if args.source or args.output:
            flags.error("--check: takes no --source and no --output")
        return check(flags, args)
    if args.picture:
        flags.error("--picture: is drawn by --check only")
    missing = [f"--{name}" for name in ("source", "output") if getattr(args, name) is None]
    if missing:
        flags.error(f"the following arguments are required: {', '.join(missing)} (or --check DIR)")
    if args.image_size is not None and args.image_size < SMALLEST:
        flags.error(f"--image-size {args.image_size}: the net sees {SMALLEST} pixels at least")
    if args.jpeg_quality > 100:
        flags.error(f"--jpeg-quality {args.jpeg_quality}: must be between 1 and 100")
    line = LiveLine()
    try:
        output = StoragePath.of(args.output)
        if (output / shards.MANIFEST).size() is not None and not args.overwrite:
            flags.error(f"--output {output}: already holds a data set; choose another folder, or say --overwrite")
        source = open_source(args.source, as_format=args.format, verify=args.verify, say=line.print)
        quality = args.jpeg_quality if args.encoding == "jpeg" else None
        check_apart(args.source, output)
        check_space(source, output, args.image_size or source.image_size, quality, args.rows_per_shard)
    except ValueError as error:
        flags.error(str(error))
    view = PrepareView(source, output)
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
        on_progress=view.progress,
    )
    view.finished(manifest)
    return 0


def check(flags: Parser, args: argparse.Namespace) -> int:
    try:
        folder = StoragePath.of(args.check)
        shards.read_manifest(folder)
    except ValueError as error:
        flags.error(str(error).replace("--data", "--check"))
    connect()
    view = CheckView()
    picture = args.picture or (folder.local or Path.cwd()) / "contact_sheet.png"
    view.finished(checking.check(folder, view.line.print, view.progress), picture)
    return 0


def script() -> int:
    """The console script, and jobs/prepare.py: returns the exit status."""
    return run_job(main)
