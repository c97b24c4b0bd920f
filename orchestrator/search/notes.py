"""The descriptions of a search's runs in MLflow (tracking/note.py)."""

from typing import Any

from orchestrator.base.markdown import code, escaped
from orchestrator.base.storage import StoragePath
from orchestrator.search.config import SearchConfig
from orchestrator.search.journal import TrialRecord
from orchestrator.tracking.note import note
from orchestrator.train.model_card import errors_line, net_line_of, repeating

NO_FOLDER = "the search keeps no folder of it"


def search_note(config: SearchConfig, data: str, how: str, command: str, result: dict[str, Any] | None = None) -> str:
    """Of the parent run. how: the search stands, in Markdown; result: result.json, once there is one."""
    varied = ", ".join(code(dimension.name) for dimension in config.space.dimensions)
    what = (
        f"A search over {varied}: {config.num_trials} trials of up to {config.train.epochs} epochs, each a training "
        f"run of {net_line_of(config.train)}; {config.searcher}, {config.scheduler}."
    )
    if result and result.get("best") is not None:
        how += f"; best trial: {result['best']}"
        if result.get("against_the_paper"):
            how += f", {escaped(result['against_the_paper'])}"
    return note(what, data, how, command)


def trial_note(
    config: SearchConfig, record: TrialRecord, how: str, search: str, data: str, num_val: int,
    trials: StoragePath | None,
) -> str:  # fmt: skip
    """Of a trial's run. how: it ended, in Markdown; trials: the folder of the trials' runs."""
    values = ", ".join(f"{code(name)} {escaped(value)}" for name, value in record.values.items())
    best = record.best(config.metric)
    what = f"Trial {record.number} of the search {escaped(search)}: {net_line_of(config.train)} with {values}."
    result = f"{how}; best: {errors_line(best, num_val)}" if best else how
    return note(what, data, result, repeating(trials / record.folder) if trials else NO_FOLDER)
