"""Train AlexNet on Ray: Ray Data feeds it, Ray Train runs it, MLflow keeps what came of it.

    python jobs/train.py                                      the digits that are embedded, about a minute
    python jobs/train.py imagenette --data SHARDS             the full net on photographs (jobs/prepare.py makes SHARDS)
    python jobs/train.py --resume NAME                        go on with an interrupted run
    python jobs/train.py --config runs/NAME/config.yaml       the settings of an earlier run again

Settings come from the recipe, then --config, then flags; each overrides what came before.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by a signal.
"""

import argparse
import sys
import time
from pathlib import Path

from orchestrator import session
from orchestrator.config import TrainConfig, make_config, read_yaml
from orchestrator.exits import run_job
from orchestrator.flags import Parser, add_fields, given_fields
from orchestrator.recipes import RECIPES
from orchestrator.runs import RunFolder


def parser(recipe: str) -> Parser:
    flags = Parser("train.py", __doc__)
    flags.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help=f"{', '.join(RECIPES)} (default: digits); its defaults are shown below",
    )
    place = flags.add_argument_group("the run")
    place.add_argument(
        "--output", type=Path, default=Path("runs"), metavar="DIR", help="where runs live (default: runs)"
    )
    place.add_argument("--name", help="of the run: its folder in --output (default: the recipe and the time)")
    place.add_argument(
        "--resume",
        metavar="NAME",
        help="go on with this run from its last checkpoint",
    )
    place.add_argument("--config", type=Path, metavar="FILE", help="YAML of settings, such as a run's config.yaml")
    place.add_argument("--dry-run", action="store_true", help="print settings, data, size and cost; start nothing")
    add_fields(flags, TrainConfig, RECIPES[recipe]())
    return flags


def main() -> int:
    first = next((word for word in sys.argv[1:] if word in RECIPES), "digits")  # its defaults are what --help shows
    flags = parser(first)
    args = flags.parse_args()
    try:
        run, config, resume = resolve(args)
        if args.dry_run:
            print(session.describe(config, args.output))
            return 0
        prepared = session.Session(
            run, config, resume=resume, recipe=None if args.config and not args.recipe else args.recipe or "digits"
        )
    except ValueError as error:
        flags.error(str(error))
    prepared.train()
    return 0


def resolve(args: argparse.Namespace) -> tuple[RunFolder, TrainConfig, bool]:
    """The run's folder and settings, and whether it goes on. Raises ValueError of one line."""
    changes = given_fields(args, TrainConfig)
    recipe = args.recipe or "digits"
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r}: unknown; the recipes are {', '.join(RECIPES)}")
    if args.resume:
        for flag in ("recipe", "config", "name"):
            if getattr(args, flag):
                raise ValueError(
                    f"--resume {args.resume}: has settings; leave out {'RECIPE' if flag == 'recipe' else '--' + flag}"
                )
        run = RunFolder(args.output, args.resume)
        return run, session.resumed(run.config(), changes), True
    fields = RECIPES[recipe]().model_dump()
    if args.config:
        fields |= read_yaml(args.config)
    kind = args.config.stem if args.config and not args.recipe else recipe
    run = RunFolder(args.output, args.name or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    return run, make_config(**fields | changes), False


if __name__ == "__main__":
    sys.exit(run_job(main))
