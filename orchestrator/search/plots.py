"""Pictures of a search. Errors are drawn in percent; the paper's constants are red everywhere."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from alexnet.pictures import plain
from orchestrator.base.shown import LONGEST_VALUE, count_of, shown
from orchestrator.search.analysis import common_epoch, importance, rungs
from orchestrator.search.config import SearchConfig
from orchestrator.search.journal import PAPER_TRIAL, Journal, TrialRecord

RED, LINE = "crimson", "viridis"
FAR = 10  # times


def all_pictures(config: SearchConfig, journal: Journal) -> dict[str, Figure]:
    """By file name. Raises nothing for a search of few trials: what cannot be drawn is left out."""
    records = [record for record in journal.trials.values() if record.history]
    if not records:
        return {}
    found = {"learning_curves.png": learning_curves(config, records), "parameters.png": against(config, records)}
    if len(records) > 1:
        found["parallel_coordinates.png"] = parallel_coordinates(config, records)
    if shares := importance(config, journal):
        found["importance.png"] = importances(config, shares, records)
    if rungs(config):
        found["rungs.png"] = rung_picture(config, records)
    return found


def learning_curves(config: SearchConfig, records: list[TrialRecord]) -> Figure:
    """The metric of every trial against epochs; a cross where it was stopped or failed."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours = _colours(config, records)
    for record in sorted(records, key=lambda record: record.number == PAPER_TRIAL):
        epochs = [entry["epoch"] for entry in record.history]
        values = [_shown(config, entry) for entry in record.history]
        papers = record.number == PAPER_TRIAL
        colour = RED if papers else colours[record.number]
        axes.plot(
            epochs, values, color=colour, linewidth=2.2 if papers else 1.2, marker=".",
            label="the paper's constants" if papers else None,
        )  # fmt: skip
        if record.status in ("STOPPED", "FAILED"):
            axes.plot(epochs[-1:], values[-1:], marker="x", color=colour, markersize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _spread(axes, [_shown(config, entry) for record in records for entry in record.history])
    axes.set_xlabel("epoch (x: stopped early)")
    axes.set_ylabel(_label(config))
    axes.grid(alpha=0.3)
    if any(record.number == PAPER_TRIAL for record in records):
        axes.legend()
    figure.suptitle(count_of(len(records), "trial"))
    return figure


def parallel_coordinates(config: SearchConfig, records: list[TrialRecord]) -> Figure:
    """A line a trial through all its settings to its best metric; the darker, the better."""
    dimensions = config.space.dimensions
    figure = Figure(figsize=(2.2 + 1.5 * len(dimensions), 5), layout="constrained")
    axes = figure.subplots()
    best = {record.number: _best(config, record) for record in records}
    low, high = min(best.values()), max(best.values())
    colours = _colours(config, records)
    for record in sorted(records, key=lambda record: -best[record.number]):
        places = [min(max(d.position(record.values[d.name]), -0.05), 1.05) for d in dimensions]
        places.append((best[record.number] - low) / max(high - low, 1e-12))
        papers = record.number == PAPER_TRIAL
        colour = RED if papers else colours[record.number]
        axes.plot(range(len(places)), places, color=colour, linewidth=2.2 if papers else 1.2, alpha=0.9)
    for i, d in enumerate(dimensions):
        axes.axvline(i, color="gray", linewidth=0.8)
        ticks = list(d.values) if d.listed else [d.at(0.0), d.at(0.5), d.at(1.0)]
        for value in ticks:
            text = f"{value:.3g}" if isinstance(value, float) else _text(value)
            axes.annotate(text, (i, d.position(value)), textcoords="offset points", xytext=(4, 2), fontsize=8)
    end = len(dimensions)
    axes.axvline(end, color="black", linewidth=0.8)
    for value in (low, high):
        place = (value - low) / max(high - low, 1e-12)
        axes.annotate(f"{value:.3g}", (end, place), textcoords="offset points", xytext=(4, 2), fontsize=8)
    axes.set_xticks(range(end + 1), [*config.space.names, _label(config)])
    axes.set_yticks([])
    axes.set_xlim(-0.15, end + 0.35)
    figure.suptitle("settings of all trials (red: the paper's)")
    return figure


def importances(config: SearchConfig, shares: dict[str, float], records: list[TrialRecord]) -> Figure:
    """A bar a setting: its share in the variance."""
    figure = Figure(figsize=(7, 0.5 * len(shares) + 1.4), layout="constrained")
    axes = figure.subplots()
    names = list(reversed(shares))
    axes.barh(names, [100 * shares[name] for name in names], color="steelblue")
    axes.set_xlabel(f"share in the variance of {_label(config)} after epoch {common_epoch(records)}, %")
    axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"which setting mattered (fANOVA over {len(records)} trials)")
    return figure


def against(config: SearchConfig, records: list[TrialRecord]) -> Figure:
    """The best metric against every setting; large dots trained long."""
    dimensions = config.space.dimensions
    columns = min(3, len(dimensions))
    rows = -(-len(dimensions) // columns)
    figure = Figure(figsize=(4 * columns, 3.1 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(dimensions) :]:
        axes.axis("off")
    for axes, d in zip(places, dimensions, strict=False):
        for record in sorted(records, key=lambda record: record.number == PAPER_TRIAL):
            value = record.values[d.name]
            papers = record.number == PAPER_TRIAL
            axes.scatter(
                _text(value) if d.listed and not _numeric(d.values) else value, _best(config, record),
                s=15 + 85 * record.epoch / config.train.epochs, alpha=0.8, color=RED if papers else "steelblue",
            )  # fmt: skip
        if d.kind == "loguniform":
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if not d.listed:
            values = [*d.values, *(record.values[d.name] for record in records)]
            axes.set_xlim(min(values) * (0.8 if min(values) > 0 else 1.2), max(values) * 1.2)
        axes.set_xlabel(d.name)
        axes.grid(alpha=0.3)
    for axes in places[::columns]:
        axes.set_ylabel(_label(config))
    figure.suptitle("best error against each setting (red: the paper's; large: trained long)")
    return figure


def rung_picture(config: SearchConfig, records: list[TrialRecord]) -> Figure:
    """The metric of the trials at the epochs where they were judged: who went on, and who was stopped."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    stages = rungs(config)
    for place, epoch in enumerate(stages):
        there = [record for record in records if record.epoch >= epoch]
        if not there:
            continue
        across = place + (np.linspace(-0.15, 0.15, len(there)) if len(there) > 1 else np.zeros(1))
        spots = {r.number: (x, _shown(config, r.history[epoch - 1])) for x, r in zip(across, there, strict=True)}
        papers = spots.pop(PAPER_TRIAL, None)
        ended = {record.number for record in there if record.ended and record.epoch == epoch}
        for numbers, colour, text in (
            (spots.keys() - ended, "steelblue", "went on"),
            (spots.keys() & ended, "lightgray", "stopped"),
        ):
            points = np.array([spots[number] for number in sorted(numbers)]).reshape(-1, 2)
            label = text if not place else None
            axes.scatter(points[:, 0], points[:, 1], color=colour, edgecolors="gray", s=50, label=label)
        if papers:
            axes.scatter(papers[0], papers[1], color=RED, marker="D", s=45)
        top = max(_shown(config, record.history[epoch - 1]) for record in there)
        axes.annotate(f"{len(there) - len(ended)} of {len(there)} on", (place, top), textcoords="offset points",
                      xytext=(0, 8), ha="center", fontsize=9)  # fmt: skip
    axes.set_xticks(range(len(stages)), [f"rung {i + 1}\nepoch {epoch}" for i, epoch in enumerate(stages)])
    axes.set_xlim(-0.6, len(stages) - 0.4)
    axes.set_ylabel(_label(config))
    axes.margins(y=0.12)
    _spread(axes, [_shown(config, r.history[epoch - 1]) for epoch in stages for r in records if r.epoch >= epoch])
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.suptitle(f"the rungs of {config.scheduler} (red: the paper's, which is never stopped)")
    return figure


def _spread(axes: Any, values: list[float]) -> None:
    """A logarithmic axis where values lie far apart, so that the small ones can be told from each other."""
    if values and min(values) > 0 and max(values) > FAR * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())


def _label(config: SearchConfig) -> str:
    return {"val/top1_error": "top-1 error, %", "val/top5_error": "top-5 error, %"}.get(config.metric, config.metric)


def _shown(config: SearchConfig, entry: dict[str, Any]) -> float:
    value = float(entry[config.metric])
    return 100 * value if config.metric.endswith("error") else value


def _best(config: SearchConfig, record: TrialRecord) -> float:
    best = record.best(config.metric)
    assert best is not None
    return _shown(config, best)


def _colours(config: SearchConfig, records: list[TrialRecord]) -> dict[int, Any]:
    """The better, the darker."""
    import matplotlib

    order = sorted(records, key=lambda record: _best(config, record))
    shades = matplotlib.colormaps[LINE](np.linspace(0.05, 0.9, len(order)))
    return {record.number: shade for record, shade in zip(order, shades, strict=True)}


def _text(value: Any) -> str:
    """A setting's value as a picture shows it."""
    return plain(shown(value, LONGEST_VALUE))


def _numeric(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
