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
import re
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
from orchestrator.tracking.evaluation import log_evaluation
from orchestrator.tracking.run import Run
from orchestrator.tracking.store import Store


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
            output = output_of(found[0], args.output)
            champion = challenged(args, found, nets, data, Path(into))
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
    log_to_mlflow(found, nets, done, data, args.labels, view)
    return register(args, found[0], done.models[0], old, data, view)


def challenged(
    args: argparse.Namespace, found: list[FoundModel], nets: list[TrainedNet], data: Data, into: Path
) -> FoundModel | None:
    """The champion that --promote compares the model with; None without one. Raises ValueError of one line."""
    flag = "--promote" if args.promote else "--register"
    name = args.promote or args.register
    if name is None:
        return None
    if args.promote and args.register:
        raise ValueError(f"--register {args.register}: --promote {args.promote} registers the model, too; leave it out")
    if len(found) > 1:
        raise ValueError(f"{flag} {name}: takes one MODEL, not {len(found)}")
    model = found[0]
    if not model.mlflow_run_id or not model.mlflow_uri:
        raise ValueError(f"{flag} {name}: MODEL {model.text} has no run in MLflow whose model could be registered")
    store, epoch = Store(model.mlflow_uri), nets[0].description.epoch
    try:
        logged = registry.newest_step(store, model.mlflow_run_id)
        champion_there = registry.champion(store, name)
    except Exception as error:  # whatever the server answers
        raise ValueError(f"{flag} {name}: MLflow does not answer: {store.reason(error)}") from None
    if logged is None:
        raise ValueError(f"{flag} {name}: the run of MODEL {model.text} has no model in MLflow")
    if logged != epoch:
        raise ValueError(
            f"{flag} {name}: MODEL {model.text} is of epoch {epoch}, and the model in MLflow of epoch {logged}: give "
            f"runs:/{model.mlflow_run_id}/model, which is that one"
        )
    if not args.promote or champion_there is None:
        return None
    champion = find_in_store(f"models:/{name}@{registry.CHAMPION}", into / "champion", model.mlflow_uri)
    column_order(champion.name, champion.load(), data)
    return champion


def register(
    args: argparse.Namespace, model: FoundModel, result: Result, old: Evaluation | None, data: Data,
    view: EvaluationView,
) -> int:  # fmt: skip
    """Carry --register or --promote out, and say what came of it; returns the exit status."""
    name = args.promote or args.register
    if name is None:
        return 0
    assert model.mlflow_run_id
    assert model.mlflow_uri
    mlflow_run = Run(Store(model.mlflow_uri), lambda text: view.line.print(f"warning: {text}"))
    mlflow_run.run_id = model.mlflow_run_id
    tags = {"data.digest": data.manifest.digest, "top1_error": f"{result.top1_error:.6f}"}
    try:
        registered = registry.register(mlflow_run, name, tags)
        view.line.print(f"registered as {registered.address}" + ("" if registered.is_new else ", which it was before"))
        if args.promote:
            decision = decide(old.models[0].wrong, result.wrong) if old else None
            view.line.print(promote(mlflow_run, registered, decision))
    except Exception as error:  # whatever the server answers
        raise JobError(f"{name}: not registered in MLflow: {mlflow_run.store.reason(error)}") from None
    return 0


def data_of(found: list[FoundModel], given: str | None) -> str:
    """The shards to evaluate on. Raises ValueError of one line where none are known."""
    data = given or next((model.data for model in found if model.data), None)
    if data is None:
        raise ValueError(f"MODEL {found[0].text}: no run says what it was trained on; give shards with --data SHARDS")
    return data


def output_of(first: FoundModel, given: str | None) -> StoragePath:
    """Where the files go. Raises ValueError for a file."""
    if given is None and first.run is not None:
        return first.run
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", first.name).strip("._-") or "model"
    output = StoragePath.of(given or f"eval-{name}")
    if output.size() is not None:
        raise ValueError(f"--output {output}: is a file; give a folder")
    return output


def log_to_mlflow(
    found: list[FoundModel], nets: list[TrainedNet], done: Evaluation, data: Data, labels: str | None,
    view: EvaluationView,
) -> None:  # fmt: skip
    """Each model's part into its own run."""
    for model, net, result in zip(found, nets, done.models, strict=True):
        if not model.mlflow_run_id or not model.mlflow_uri:
            continue
        folder = "eval" + ("_10crop" if result.views == 10 else "")
        whole = files.as_json(done, data, labels)
        figures = {f"{folder}/{name}": figure for name, figure in files.pictures(result, several=False).items()}
        arrived = log_evaluation(
            model.mlflow_uri, model.mlflow_run_id, files.metric_names(result, data.split, labels),
            {f"{folder}/{files.EVALUATION}": files.to_text(whole)}, figures,
            step=net.description.epoch or 0, warn=lambda text: view.line.print(f"warning: {text}"),
        )  # fmt: skip
        if arrived:
            view.line.print(f"  MLflow run  {model.mlflow_run_id} ({model.name})")


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
