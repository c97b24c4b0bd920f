"""Look into a trained net: pictures of what it learned and why it answers as it does, and a page with all of them.

    python jobs/look.py NAME                            a run, its best checkpoint, on the data of its training
    python jobs/look.py NAME --data SHARDS              on other shards of the same classes
    python jobs/look.py NAME --image cat.jpg            on a photograph of yours; may be repeated
    python jobs/look.py models:/digits@champion --film

Draws the kernels of the first layer with how coloured each column is (paper, Figure 3); predictions, and the training
images that are nearest in fc7 (Figure 4); the surest mistakes; where the net looks (Grad-CAM); feature maps; fc7 in two
dimensions; with --film the kernels at every epoch whose weights were kept. look.html has all of them in one file that
needs nothing else. They become artifacts of the model's run in MLflow, too.
"""

import argparse
import tempfile
from pathlib import Path

from orchestrator.base.exits import hinting_at_memory
from orchestrator.base.shown import LONGEST_VALUE, count_of, shown
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine, bar
from orchestrator.cli.flags import Parser, positive_int, run
from orchestrator.models import film
from orchestrator.models.find import WHAT, find_model
from orchestrator.models.look import PAGE, Look, data_of, own_images
from orchestrator.models.stored import Part
from orchestrator.tracking.artifacts import add_files

FOLDER = "look"  # in the run's, and in MLflow


def parser() -> Parser:
    flags = Parser("look", __doc__)
    flags.add_argument("model", metavar="MODEL", help=WHAT)
    flags.add_argument("--data", metavar="SHARDS", help="shards made by prepare (default: those it was trained on)")
    flags.add_argument(
        "--image", metavar="FILE", type=Path, action="append", default=[], help="a photograph to explain; repeatable"
    )
    flags.add_argument(
        "--max-images",
        metavar="N",
        type=positive_int,
        help="look at about this many images of each part, evenly apart (default: all)",
    )
    flags.add_argument("--film", action="store_true", help="also a film of the first layer over the epochs")
    flags.add_argument(
        "--output", metavar="DIR", help="folder or URI (default: look in the run's folder, or look-MODEL in this one)"
    )
    return flags


def main(flags: Parser, args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="alexnet-look-") as temporary:
        return _look(flags, args, Path(temporary))


def _look(flags: Parser, args: argparse.Namespace, into: Path) -> int:
    line = LiveLine()
    try:
        found = find_model(args.model, into)
        trained = found.load()
        own = own_images(trained, args.image)
        data, about_data = data_of(found, trained, args.data)
        parts = [Part(data, split, args.max_images) for split in ("train", "val")] if data else [None, None]
        kernels = film.kernels_by_epoch(film.folder_of(found)) if args.film else {}
        default = found.run / FOLDER if found.run else StoragePath.of(f"{FOLDER}-{found.name}")
        output = StoragePath.of(args.output) if args.output else default
    except ValueError as error:
        flags.error(str(error))
    if about_data:
        line.print(about_data)
    look = Look(trained, shown(found.name, LONGEST_VALUE), lambda what, done, total: line.update(
        f"{what} images {bar(done / total)} {done}/{total}"
    ))  # fmt: skip
    look.kernels()
    try:
        _write(look.files, output)  # before what may take hours
    except OSError as error:
        flags.error(f"--output {output}: cannot be written ({error.strerror}); choose another folder")
    if kernels:
        look.film(kernels)
    with hinting_at_memory("fewer --image, or a machine with more memory, may do"):
        look.images(own, *parts)
    described = trained.description
    trained_on = f"trained on {described.data}: " if described.data else ""
    epoch = f", after epoch {described.epoch}" if described.epoch is not None else ""
    facts = [f"{trained_on}{len(described.classes)} classes{epoch}"]
    look.page([*facts, *([about_data] if about_data else [])])
    _write(look.files, output)
    line.print(f"{count_of(len(look.files) - 1, 'picture')} in {output}", f"page      {output / PAGE}")
    if found.mlflow_run_id and found.mlflow_uri:
        problem = add_files(found.mlflow_uri, found.mlflow_run_id, FOLDER, look.files)
        line.print(f"warning: {problem}" if problem else f"MLflow    run {found.mlflow_run_id}, artifacts {FOLDER}/")
    return 0


def _write(files: dict[str, bytes], output: StoragePath) -> None:
    for name, content in files.items():
        (output / name).write(content)


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
