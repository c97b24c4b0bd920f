"""Search for better settings than the paper's: trials are complete training runs, which Ray Tune runs in parallel.

    python jobs/tune.py                                       learning rate, decay and LRN on the bundled digits
    python jobs/tune.py imagenette --data SHARDS --num-samples 32 --time-budget 8h
    python jobs/tune.py --space space.yaml --scheduler fifo   a space of your own (lr: {loguniform: [0.001, 0.1]})
    python jobs/tune.py --resume NAME                         resume an interrupted search

The first trial uses the paper's constants, so every search reports whether it found better ones. It writes best.yaml
(for jobs/train.py --config), a table of the best trials, and plots.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by a signal.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from orchestrator.base.environment import command, default_output
from orchestrator.base.shown import quoted
from orchestrator.base.storage import StoragePath
from orchestrator.cli.flags import (
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
from orchestrator.config.layers import NONE
from orchestrator.config.models import read_yaml
from orchestrator.config.recipes import adapted
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import with_absolute_data
from orchestrator.search.config import SearchConfig, SearchSettings, make_search
from orchestrator.search.folder import SearchFolder
from orchestrator.search.forecast import describe
from orchestrator.search.recipes import SEARCHES
from orchestrator.search.search import Search
from orchestrator.train.run_folder import locate

MAY_CHANGE = ("num_samples", "max_concurrent", "time_budget")  # of a search that is resumed


def parser() -> Parser:
    flags = Parser("tune", __doc__)
    add_recipe(flags, SEARCHES)
    place = flags.add_argument_group("the search")
    place.add_argument(
        "--output",
        default=default_output(),
        metavar="DIR",
        help="where searches are stored: a folder, or a URI such as s3://BUCKET/runs (default: %(default)s)",
    )
    place.add_argument(
        "--name",
        help="name of the search and of its folder in --output (default: tune-RECIPE-TIME)",
    )
    place.add_argument(
        "--resume",
        metavar="NAME",
        help="resume a search, given by its name or its folder OUTPUT/NAME; finished trials are not run again",
    )
    place.add_argument(
        "--space",
        type=Path,
        metavar="FILE",
        help="YAML file of what to search: choice, uniform, loguniform, randint or grid (default: the recipe's)",
    )
    add_register(place, "the model of the best trial")
    place.add_argument("--dry-run", action="store_true", help="print the space, the trials and the cost, and exit")
    place.add_argument("--images-per-s", type=positive, metavar="X", help="speed of a trial that --dry-run assumes")
    defaults = SEARCHES[shown_recipe(SEARCHES)]()
    add_fields(flags, SearchSettings, defaults)
    add_fields(flags, TrainConfig, defaults.train)
    return flags


def main(flags: Parser, args: argparse.Namespace) -> int:
    try:
        folder, config, resume = resolve(args)
        if args.dry_run:
            print(describe(config, StoragePath.of(args.output), args.images_per_s))
            return 0
        prepared = Search(folder, config, resume=resume, register=args.register)
    except ValueError as error:
        flags.error(str(error))
    prepared.run()
    return 0


def resolve(args: argparse.Namespace) -> tuple[SearchFolder, SearchConfig, bool]:
    """The search's folder and settings, and whether it is resumed. Raises ValueError of one line."""
    recipe = recipe_of(args, SEARCHES)
    training, settings = given_fields(args, TrainConfig), given_fields(args, SearchSettings)
    if args.resume:
        only_resume(args, "space", "name")
        args.output, name = locate(args.output, args.resume)
        if wrong := [*training, *(name for name in settings if name not in MAY_CHANGE)]:
            allowed = ", ".join("--" + name.replace("_", "-") for name in MAY_CHANGE)
            raise ValueError(f"--{wrong[0].replace('_', '-')}: cannot change when a search is resumed, only {allowed}")
        folder = SearchFolder(args.output, name, "--resume")
        config = folder.search()
        config = make_search(config.settings() | settings, with_absolute_data(config.train), config.space.to_dict())
        return folder, config, True
    defaults = SEARCHES[recipe]()
    train = with_absolute_data(adapted(defaults.train, training).changed(**training))
    space = read_yaml(args.space, "--space") if args.space else default_space(defaults.space.to_dict(), train)
    if both := [name for name in training if name in space]:
        raise ValueError(f"--{both[0].replace('_', '-')}: {both[0]} varies in this search; leave out the flag")
    if train.freeze != NONE or "freeze" in space:
        raise ValueError(
            f"freeze = {quoted(space.get('freeze', train.freeze))}: trials start from random weights, which these "
            f"layers would keep; leave it out, or fine-tune with {command('train')} --start-from MODEL"
        )
    config = make_search(defaults.settings() | settings, train, space)
    folder = SearchFolder(args.output, args.name or f"tune-{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    return folder, config, False


def default_space(space: dict[str, Any], base: TrainConfig) -> dict[str, Any]:
    """A recipe's space without the constants of LRN, if the preset has no LRN; a line tells."""
    if base.net.lrn is not None:
        return space
    kept = {name: values for name, values in space.items() if not name.startswith("lrn_")}
    print(f"preset {base.preset} has no LRN: the search varies {' and '.join(kept)} alone")
    return kept


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
