"""Turn a folder of photographs into shards that training reads, or check shards.

    python jobs/prepare.py --source PHOTOS --output SHARDS
    python jobs/prepare.py --check SHARDS

PHOTOS has train/CLASS/IMAGE and val/CLASS/IMAGE. Every image becomes RGB, its shorter side 256 pixels, its centre
256x256, a JPEG in a Parquet shard. `--source digits` takes the 1,797 digits that scikit-learn ships instead.

--check holds every shard against its checksum, counts rows, classes and labels, has the feed decode and cut every image
as training would, prints images/s, and draws a contact sheet of augmented images.
"""

import argparse
import sys
from pathlib import Path

from orchestrator import checking, shards
from orchestrator.cluster import connect
from orchestrator.exits import run_job
from orchestrator.flags import Parser, fraction, natural, positive_int
from orchestrator.progress import CheckView, PrepareView
from orchestrator.sources import open_source


def parser() -> Parser:
    flags = Parser("prepare.py", __doc__)
    flags.add_argument("--source", metavar="DIR", help="folder with train/ and val/, or the word digits")
    flags.add_argument("--output", metavar="DIR", type=Path, help="folder for the shards; must not hold a data set yet")
    flags.add_argument("--check", metavar="DIR", type=Path, help="check the shards in this folder instead")
    flags.add_argument(
        "--picture", metavar="FILE", type=Path, help="of --check: the contact sheet (default: DIR/contact_sheet.png)"
    )
    flags.add_argument("--overwrite", action="store_true", help="replace the data set that --output holds")
    flags.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="side of the stored images (default: 256; digits 72)"
    )
    flags.add_argument("--seed", type=natural, default=0, help="of the one global shuffle (default: 0)")
    flags.add_argument(
        "--encoding",
        choices=shards.ENCODINGS,
        default="jpeg",
        help="jpeg: 21 KB an image of 256 pixels; raw: 197 KB, and no decoding in training (default: jpeg)",
    )
    flags.add_argument("--jpeg-quality", type=positive_int, default=shards.JPEG_QUALITY, help="1 to 100 (default: 90)")
    flags.add_argument(
        "--rows-per-shard", type=positive_int, default=shards.ROWS_PER_SHARD, help="images in a file (default: 1024)"
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
    if args.jpeg_quality > 100:
        flags.error(f"--jpeg-quality {args.jpeg_quality}: must be between 1 and 100")
    if (args.output / shards.MANIFEST).exists() and not args.overwrite:
        flags.error(f"--output {args.output}: already holds a data set; choose another folder, or say --overwrite")
    try:
        source = open_source(args.source)
    except ValueError as error:
        flags.error(str(error))
    view = PrepareView(source, args.output)
    connect()
    manifest = shards.prepare(
        source,
        args.output,
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
        shards.read_manifest(args.check)
    except ValueError as error:
        flags.error(str(error).replace("--data", "--check"))
    connect()
    view = CheckView()
    view.finished(checking.check(args.check, view.line.print, view.progress), args.picture, args.check)
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
