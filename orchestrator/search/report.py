"""What a search prints at its end."""

from typing import Any

from orchestrator.base.terminal import duration, table
from orchestrator.search.config import SearchConfig
from orchestrator.search.folder import SearchFolder
from orchestrator.search.journal import Journal
from orchestrator.tracking.store import ui_command
from orchestrator.train.run_folder import RESULT


def summary(
    result: dict[str, Any], config: SearchConfig, journal: Journal, folder: SearchFolder, pictures: list[str], uri: str
) -> str:
    """Lines below the table of the best trials. uri: of MLflow."""
    whole = config.train.epochs * len(journal.trials)
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result["importance"].items())
    changed = " (its settings changed during training)" if journal.trials[result["best"]].start else ""
    rows = [
        ("epochs", f"{result['epochs_used']} of the {whole} that all trials to the end would take"),
        ("time", duration(result["elapsed_s"])),
        *([("cost", f"${result['cost_usd']:.2f} for all nodes")] if "cost_usd" in result else []),
        ("importance", shares or "too few trials to say"),
        ("pictures", f"{', '.join(pictures)} in {folder.path}"),
        ("train the best", result["command"] + changed),
        ("result", str(folder.path / RESULT)),
        ("MLflow run", result["mlflow_run_id"] or "none"),
        ("open the UI", ui_command(uri)),
    ]
    return table(rows)
