"""Train AlexNet on Ray: Ray Data feeds it, Ray Train runs it, MLflow tracks it.

    python jobs/train.py                                      the bundled digits, about a minute
    python jobs/train.py imagenette --data SHARDS             the full net on photographs (jobs/prepare.py makes SHARDS)
    python jobs/train.py --start-from MODEL --data SHARDS     fine-tune a trained net, such as an earlier run's
    python jobs/train.py --resume NAME                        resume an interrupted run
    python jobs/train.py --config runs/NAME/config.yaml       reuse the settings of an earlier run

Settings come from the recipe, then --config, then flags; later ones win.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by a signal.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path, PurePosixPath

from orchestrator.base.environment import default_output
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine
from orchestrator.cli.flags import (
    DEFAULT_RECIPE,
    Parser,
    add_fields,
    add_recipe,
    add_register,
    given_fields,
    only_resume,
    positive,
    recipe_of,
    run,
    shown_recipe,
)
from orchestrator.config.models import read_yaml
from orchestrator.config.recipes import RECIPES, adapted
from orchestrator.config.train import TrainConfig, make_config
from orchestrator.data.dataset import with_absolute_data
from orchestrator.models.find import WHAT, find_model
from orchestrator.train import session
from orchestrator.train.forecast import describe
from orchestrator.train.pretrained import Pretrained, check_frozen
from orchestrator.train.profile_trace import MOST_STEPS, WARM_UP_STEPS
from orchestrator.train.run_folder import RunFolder, locate


def parser() -> Parser:
    flags = Parser("train", __doc__)
    add_recipe(flags, RECIPES)
    place = flags.add_argument_group("the run")
    place.add_argument(
        "--output",
        default=default_output(),
        metavar="DIR",
        help="where runs are stored: a folder, or a URI such as s3://BUCKET/runs (default: %(default)s)",
    )
    place.add_argument("--name", help="name of the run and of its folder in --output (default: RECIPE-TIME)")
    place.add_argument(
        "--resume",
        metavar="NAME",
        help="resume a run, given by its name or its folder OUTPUT/NAME, from its last checkpoint",
    )
    place.add_argument(
        "--start-from",
        metavar="MODEL",
        help=f"start from the weights of a trained net, and take its size, LRN and pixel scale: {WHAT}",
    )
    place.add_argument("--config", metavar="FILE", help="YAML file of settings, such as a run's config.yaml")
    add_register(place, "the best model of the run")
    place.add_argument(
        "--dry-run", action="store_true", help="print the settings, the data, the size and the cost, and exit"
    )
    place.add_argument(
        "--profile",
        type=num_profiled,
        default=0,
        metavar="N",
        help=f"record N steps of every worker, at most {MOST_STEPS}, after the first {WARM_UP_STEPS} of this session: "
        "prints where their time goes, and writes a trace for Perfetto to the run's folder",
    )
    place.add_argument("--images-per-s", type=positive, metavar="X", help="training speed that --dry-run assumes")
    add_fields(flags, TrainConfig, RECIPES[shown_recipe(RECIPES)]())
    return flags


def main(flags: Parser, args: argparse.Namespace) -> int:
    try:
        folder, config, resume = resolve(args)
        with tempfile.TemporaryDirectory(prefix="model-") as temporary:  # of one that has to be fetched
            pretrained = None
            if args.start_from:
                pretrained, config = start_from(args, config, Path(temporary))
            if not resume:
                check_frozen(config, pretrained)
            recipe = args.recipe or (None if args.config or resume else DEFAULT_RECIPE)
            if args.dry_run and args.profile:
                raise ValueError("--profile: --dry-run makes no step; leave one of them out")
            if args.dry_run:
                print(describe(config, StoragePath.of(args.output), args.images_per_s, recipe))
                return 0
            if resume and not args.register and (lines := session.nothing_left(folder, config)):
                LiveLine().print(*lines)
                return 0
            prepared = session.Session(
                folder, config, resume=resume, recipe=recipe, start=pretrained, register=args.register,
                profile=args.profile,
            )  # fmt: skip
    except ValueError as error:
        flags.error(str(error))
    prepared.train()
    return 0


def num_profiled(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_STEPS:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of steps from 1 to {MOST_STEPS}")
    return int(text)


def resolve(args: argparse.Namespace) -> tuple[RunFolder, TrainConfig, bool]:
    """The run's folder and settings, and whether it is resumed. Raises ValueError of one line."""
    changes = given_fields(args, TrainConfig)
    recipe = recipe_of(args, RECIPES)
    if args.resume:
        only_resume(args, "config", "name", "start_from")
        args.output, name = locate(args.output, args.resume)
        folder = RunFolder(args.output, name, "--resume")
        return folder, with_absolute_data(session.resumed(session.settings_of(folder), changes)), True
    given = (read_yaml(args.config) if args.config else {}) | changes
    fields = adapted(RECIPES[recipe](), given).model_dump() | given
    kind = PurePosixPath(args.config.partition("?")[0]).stem if args.config and not args.recipe else recipe
    kind = re.sub(r"[^A-Za-z0-9._-]+", "-", kind).strip("._-") or "run"  # a file may be called anything
    folder = RunFolder(args.output, args.name or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    return folder, with_absolute_data(make_config(**fields)), False


def start_from(args: argparse.Namespace, config: TrainConfig, into: Path) -> tuple[Pretrained, TrainConfig]:
    """The trained net that --start-from names, and the settings with its own, but for those that were given.

    into: a folder for what has to be fetched. Raises ValueError of one line.
    """
    found = find_model(args.start_from, into, args.output)
    trained, folder = found.load(), found.path
    if not folder.is_dir():  # one file, perhaps of another program
        folder = into / "start"
        trained.save(folder)
    pretrained = Pretrained(StoragePath.of(folder), trained.description, args.start_from)
    in_file = {
        name: value for name, value in (read_yaml(args.config) if args.config else {}).items() if value is not None
    }
    given = {name: getattr(config, name) for name in {**in_file, **given_fields(args, TrainConfig)}}
    for line in pretrained.differences(given):
        print(line)
    settings = pretrained.settings() | given
    return pretrained, adapted(config, settings).changed(**settings)


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
