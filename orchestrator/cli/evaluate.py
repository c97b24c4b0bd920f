"""Evaluate trained nets: errors with intervals, classes, confusion, calibration; several, also against each other.

    python jobs/evaluate.py digits-20261126-102157            a run, on the validation images of its data
    python jobs/evaluate.py RUN --views 10                    the mean over ten crops, as in the paper
    python jobs/evaluate.py RUN OTHER                         each, their ensemble, and the difference between them
    python jobs/evaluate.py RUN --data SHARDS                 other shards of the same classes
    python jobs/evaluate.py RUN --labels real.json            other labels of the same images
    python jobs/evaluate.py RUN --promote digits              the champion in MLflow, if it is better than that

MODEL is the name of a run or a search, its folder, a checkpoint, runs:/RUN_ID/model or models:/NAME@ALIAS in MLflow.
What is found goes to evaluation.json, predictions.parquet and pictures, and into the model's MLflow run.
"""

import argparse
import tempfile
from pathlib import Path

from alexnet.trained import TrainedNet
from orchestrator.base.environment import default_output
from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.cli.flags import Parser, add_register, positive_int, registered_name, run
from orchestrator.cluster.connection import connect
from orchestrator.models import evaluation_files as files
from orchestrator.models.engine import BATCH_SIZE, Settings, needs_ray
from orchestrator.models.evaluate import Data, Evaluation, Result, check_ensemble, column_order, evaluate, open_data
from orchestrator.models.evaluation_view import EvaluationView
from orchestrator.models.find import FoundModel, find_in_store, find_models
from orchestrator.models.label_sets import read_label_sets
from orchestrator.models.promote import decide, promote
from orchestrator.tracking import registry
from orchestrator.tracking.artifacts import add_files
from orchestrator.tracking.run import Run
from orchestrator.tracking.store import Store
from orchestrator.train.messages import Metrics
from orchestrator.train.model_log import version_facts


def parser() -> Parser:
    flags = Parser("evaluate", __doc__)
    flags.add_argument("models", nargs="+", metavar="MODEL", help="a trained net; several are also compared")
    flags.add_argument("--data", metavar="SHARDS", help="folder or URI (default: the shards of the model's run)")
    flags.add_argument("--split", choices=("val", "train"), default="val", help="of the shards (default: val)")
    flags.add_argument(
        "--labels", metavar="FILE", help="JSON: lists of valid labels, by the image's number or its name"
    )
    flags.add_argument("--output", metavar="DIR", help="for what is found (default: the folder of the model's run)")
    add_engine(flags)
    models = flags.add_argument_group("the model registry of MLflow")
    add_register(models, "the model")
    models.add_argument(
        "--promote", metavar="NAME", type=registered_name,
        help="register it as --register does, and make it the champion, models:/NAME@champion, if it is better than "
        "that is by more than chance: the 95 %% interval of the difference in top-1 error, on these images",
    )  # fmt: skip
    return flags


def add_engine(flags: Parser) -> None:
    """The flags that say how nets are applied; `settings_of` reads them."""
    flags.add_argument("--views", type=int, choices=(1, 10), default=1,
                       help="crops of an image: 1, the centre, or the paper's 10 (default: 1)")  # fmt: skip
    flags.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    flags.add_argument("--batch-size", type=positive_int, default=BATCH_SIZE, metavar="N",
                       help="images at a time (default: %(default)s)")  # fmt: skip
    flags.add_argument("--workers", type=positive_int, metavar="N",
                       help="Ray actors (default: on a cluster one per GPU or node; else this process)")  # fmt: skip


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(args.views, args.precision, args.batch_size, args.device)


def main(flags: Parser, args: argparse.Namespace) -> int:
    view = EvaluationView()
    with tempfile.TemporaryDirectory(prefix="models-") as into:
        try:
            found = find_models(args.models, Path(into), default_output())
            nets = [model.load() for model in found]
            data = open_data(data_of(found, args.data), args.split)
            check_ensemble([model.name for model in found], nets)
            for model, net in zip(found, nets, strict=True):
                column_order(model.name, net, data)
            valid = read_label_sets(args.labels, data.rows, data.classes) if args.labels else None
            champion, version = challenged(args, found, nets, data, Path(into))
            variants = [
                files.variant(settings_of(args), data, digest_of(net, model, args.data, data), args.labels)
                for model, net in zip(found, nets, strict=True)
            ]
            output = output_of(found, args.output, variants[0])
        except ValueError as error:
            flags.error(str(error))
        if needs_ray(args.workers):
            connect()
        view.begun([model.name for model in found], data, args.views)
        with files.Predictions(output, data, data.outputs(nets[0])) as predictions:
            done = evaluate(
                [(model.name, net) for model, net in zip(found, nets, strict=True)], data, settings_of(args),
                valid=valid, num_workers=args.workers, keep=predictions.keep, progress=view.progress,
            )  # fmt: skip
        written = files.write(done, data, output, args.labels)
        old = None
        if champion is not None:  # apart, so that what is written is the new model's alone
            view.begun([champion.name], data, args.views)
            old = evaluate(
                [(champion.name, champion.load())], data, settings_of(args), valid=valid, num_workers=args.workers,
                progress=view.progress,
            )  # fmt: skip
    view.finished(done, data, output, written, args.labels)
    log_to_mlflow(found, nets, done, data, args.labels, variants, view)
    return register(args, found[0], nets[0], done.models[0], old, version, data, view)


def challenged(
    args: argparse.Namespace, found: list[FoundModel], nets: list[TrainedNet], data: Data, into: Path
) -> tuple[FoundModel | None, str | None]:
    """The champion that --promote compares the model with, and its version; None without one. Raises ValueError of one
    line."""
    flag = "--promote" if args.promote else "--register"
    name = args.promote or args.register
    if name is None:
        return None, None
    if args.promote and args.register:
        raise ValueError(f"--register {args.register}: --promote {args.promote} registers the model, too; leave it out")
    if len(found) > 1:
        raise ValueError(f"{flag} {name}: takes one MODEL, not {len(found)}")
    model = found[0]
    if not model.mlflow_run_id or not model.mlflow_uri:
        raise ValueError(f"{flag} {name}: MODEL {model.text} has no run in MLflow whose model could be registered")
    store, epoch = Store(model.mlflow_uri), nets[0].description.epoch
    try:
        if not store.exists(model.mlflow_run_id):
            raise ValueError(f"its run {model.mlflow_run_id} was deleted, or is in another store")
        logged = registry.newest_step(store, model.mlflow_run_id)
        version = registry.champion(store, name)
    except Exception as error:  # whatever the server answers
        where = f"MODEL {model.text}, in MLflow at {store.redacted(store.uri)}"
        raise ValueError(f"{flag} {name}: {where}: {store.reason(error)}") from None
    if logged is None:
        raise ValueError(f"{flag} {name}: the run of MODEL {model.text} has no model in MLflow")
    if logged != epoch:
        raise ValueError(
            f"{flag} {name}: MODEL {model.text} is of epoch {epoch}, and the model in MLflow of epoch {logged}: give "
            f"runs:/{model.mlflow_run_id}/model, which is that one"
        )
    if not args.promote or version is None:
        return None, None
    # by its version: the alias may move meanwhile
    champion = find_in_store(f"models:/{name}/{version}", into / "champion", model.mlflow_uri)
    column_order(champion.name, champion.load(), data)
    return champion, version


def register(
    args: argparse.Namespace, model: FoundModel, trained: TrainedNet, result: Result, old: Evaluation | None,
    version: str | None, data: Data, view: EvaluationView,
) -> int:  # fmt: skip
    """Carry --register or --promote out, and say what came of it; returns the exit status."""
    name = args.promote or args.register
    if name is None:
        return 0
    assert model.mlflow_run_id
    assert model.mlflow_uri
    mlflow_run = Run(Store(model.mlflow_uri), lambda text: view.line.print(f"warning: {text}"))
    mlflow_run.run_id = model.mlflow_run_id
    entry: Metrics = {"epoch": trained.description.epoch or 0, "val/top1_error": result.top1_error}
    entry |= {} if result.top5_error is None else {"val/top5_error": result.top5_error}
    tags, about = version_facts(trained.description, data.manifest, entry, data.split)
    try:
        registered = registry.register(mlflow_run, name, tags, about)
        view.line.print(f"registered as {registered.address}" + ("" if registered.is_new else ", which it was before"))
        if args.promote:
            decision = decide(old.models[0].wrong, result.wrong) if old else None
            view.line.print(promote(mlflow_run, registered, decision, version))
    except JobError:
        raise
    except Exception as error:  # whatever the server answers
        raise JobError(f"{name}: not registered in MLflow: {mlflow_run.store.reason(error)}") from None
    return 0


def data_of(found: list[FoundModel], given: str | None) -> str:
    """The shards to evaluate on. Raises ValueError of one line where none are known."""
    data = given or next((model.data for model in found if model.data), None)
    if data is None:
        raise ValueError(f"MODEL {found[0].text}: no run says what it was trained on; give shards with --data SHARDS")
    return data


def digest_of(trained: TrainedNet, model: FoundModel, given: str | None, data: Data) -> str | None:
    """Of the data that a net was trained on. A net of before 0.3 may not say it: its run's data is what it was, and
    what is given to a model without a run the only data that there is."""
    if trained.description.digest or given is None or model.data in (None, str(data.folder)):
        return trained.description.digest or None
    return "another"


def output_of(found: list[FoundModel], given: str | None, what: tuple[str, ...]) -> StoragePath:
    """Where the files go: those of another checkpoint than the run's best, of several models or of another `what` into
    a folder of their own, so that none replaces those of the plain evaluation. Raises ValueError for a file."""
    first = found[0]
    run = first.run.name if first.run is not None else first.name
    parts = [first.name.removeprefix(f"{run}-")] if first.name != run else []
    others = "-".join(model.name for model in found[1:])
    parts += [f"with-{files.plain_name(others)}"] if others else []
    place = first.run if first.run is not None else StoragePath.of(f"eval-{files.plain_name(first.name)}")
    apart = "-".join([*parts, *what])
    output = StoragePath.of(given) if given else place / f"evaluation-{apart}" if apart else place
    if output.size() is not None:
        raise ValueError(f"--output {output}: is a file; give a folder")
    return output


def log_to_mlflow(
    found: list[FoundModel], nets: list[TrainedNet], done: Evaluation, data: Data, labels: str | None,
    variants: list[tuple[str, ...]], view: EvaluationView,
) -> None:  # fmt: skip
    """Each model's part into its own run."""
    for model, net, result, what in zip(found, nets, done.models, variants, strict=True):
        if not model.mlflow_run_id or not model.mlflow_uri:
            continue
        whole = files.to_text(files.as_json(done, data, labels)).encode()
        problem = add_files(
            model.mlflow_uri, model.mlflow_run_id, "_".join(["eval", *what]),
            {files.EVALUATION: whole} | files.picture_files(result, several=False), files.metric_names(result, what),
            step=net.description.epoch or 0,
        )  # fmt: skip
        if problem:
            view.line.print(f"warning: the evaluation did not reach MLflow: {problem}")
        else:
            view.line.print(f"  MLflow run  {model.mlflow_run_id} ({model.name})")


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
