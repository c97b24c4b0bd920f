"""What an evaluation prints: its progress, and its outcome in tables."""

from collections.abc import Sequence

from alexnet.intervals import error_interval
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine, bar, columns, duration, percent, table
from orchestrator.models.evaluate import Data, Evaluation, Result
from orchestrator.models.evaluation_files import published
from orchestrator.models.metrics import Comparison

SHOWN_CLASSES = 12  # all of them are in evaluation.json
SHOWN_PAIRS = 5


class EvaluationView:
    """Of one evaluation."""

    def __init__(self) -> None:
        self.line = LiveLine()

    def progress(self, done: int, total: int, seconds: float) -> None:
        speed = done / max(seconds, 1e-9)
        self.line.update(
            f"{bar(done / total)} {done}/{total} images, {speed:.0f} images/s, {duration((total - done) / speed)} left"
        )

    def begun(self, models: Sequence[str], data: Data, views: int) -> None:
        view = "the centre crop" if views == 1 else "ten crops"
        self.line.print(
            f"evaluating {', '.join(models)} on {len(data.rows)} {data.split} images of {data.folder}, {view}"
        )

    def finished(self, done: Evaluation, data: Data, output: StoragePath, files: list[str], labels: str | None) -> None:
        lines = ["", *columns(["model", "top-1 error", "95 %", "top-5 error", "loss", "calibration error"],
                              [_row(result) for result in done.results])]  # fmt: skip
        if near := published(data, labels):
            rows = [[what, percent(top1), percent(top5), str(views)] for what, views, top1, top5 in near]
            lines += ["", *columns(["published, ILSVRC-2012 validation", "top-1", "top-5", "views"], rows)]
        lines += [""] if done.comparisons else []
        lines += [f"{first} against {second}: {_compared(found)}" for first, second, found in done.comparisons]
        best = done.results[-1] if done.ensemble else done.models[0]
        lines += ["", *_classes(best)]
        if pairs := best.confused(SHOWN_PAIRS):
            rows = [[pair["class"], pair["taken_for"], str(pair["images"]), percent(pair["share"])] for pair in pairs]
            lines += ["", *columns(["most confused", "taken for", "images", "of the class"], rows)]
        self.line.print(*lines, "")
        facts = [("images", str(len(best.wrong)))]
        if done.left_out:
            facts.append(("left out", f"{done.left_out} images without a valid label in {labels}"))
        facts += [("speed", f"{done.images_per_s:.0f} images/s"), ("results", str(output / files[0]))]
        facts += [("", name) for name in files[1:]]
        for line in table(facts).splitlines():
            self.line.print(line)


def _row(result: Result) -> list[str]:
    low, high = error_interval(int(result.wrong.sum()), len(result.wrong))
    top5 = "" if result.top5_error is None else percent(result.top5_error)
    interval = f"{100 * low:.2f} to {percent(high)}"
    return [result.name, percent(result.top1_error), interval, top5, f"{result.loss:.4f}",
            percent(result.calibration.ece)]  # fmt: skip


def _compared(found: Comparison) -> str:
    low, high = (100 * end for end in found.interval)
    verdict = "a difference" if found.is_significant else "no difference beyond chance"
    return (
        f"{100 * found.difference:+.2f} points of top-1 error (95 %: {low:+.2f} to {high:+.2f}), McNemar's exact "
        f"p = {found.p_value:.3g}: {verdict}"
    )


def _classes(result: Result) -> list[str]:
    """The classes, the worst first where there are many."""
    rows = [row for row in result.per_class() if row["images"]]
    title = "class"
    if len(rows) > SHOWN_CLASSES:
        rows = sorted(rows, key=lambda row: -row["top1_error"])[:SHOWN_CLASSES]
        title = f"class (the {SHOWN_CLASSES} worst)"
    shown = [[row["class"], str(row["images"]), percent(row["top1_error"])] for row in rows]
    return columns([title, "images", "top-1 error"], shown)
