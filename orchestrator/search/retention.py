"""Which checkpoints of a search's trials are kept."""

import logging
import re
from pathlib import PurePosixPath

from orchestrator.base.storage import PARTIAL, StoragePath
from orchestrator.search.config import SearchConfig
from orchestrator.search.journal import PAPER_TRIAL, Journal
from orchestrator.train.run_folder import CHECKPOINT_PREFIX, KEPT, KEPT_EPOCH_PREFIX

log = logging.getLogger(__name__)

KEPT_NAME = re.compile(r"(\d+)(?:-(\d+)-from-\d+-at-\d+)?-" + CHECKPOINT_PREFIX + r"(\d+)")
KEPT_PER_TRIAL = 2


class Retention:
    """Removes the checkpoints of trials that nobody will ask for again."""

    def __init__(self, config: SearchConfig, journal: Journal, trials: StoragePath) -> None:
        """trials: the folder of the trials' runs."""
        self.config, self.journal, self.trials = config, journal, trials
        self._removed: set[int] = set()  # trials whose checkpoints are gone: each is listed once

    def keep_the_best(self, at_rest: set[int]) -> None:
        """Keep the checkpoints of the best trial, of the best ended one and of the paper's; remove those of others.

        at_rest: trials whose workers have ended. A population's checkpoints are needed until all trials end.
        """
        records = self.journal.trials
        if self.config.scheduler == "pbt" and any(not record.ended for record in records.values()):
            return
        ranked = self.journal.ranked(self.config.metric)  # the best may still fail
        best = ranked[:1] + [record for record in ranked if record.ended][:1]
        kept = {PAPER_TRIAL, *(record.number for record in best)}
        kept_runs = {records[number].folder for number in kept if number in records}
        for record in records.values():
            if not record.ended or record.number not in at_rest or record.number in self._removed:
                continue
            for run in (*record.earlier_folders, record.folder):
                if run not in kept_runs:
                    self._remove_checkpoints(run)
            if record.number not in kept:
                self._removed.add(record.number)

    def _remove_checkpoints(self, run: str) -> None:
        for name in (self.trials / run).children():
            if name.startswith((CHECKPOINT_PREFIX, KEPT_EPOCH_PREFIX)):
                (self.trials / run / name).remove()
                log.debug("removed %s of %s", name, run)

    def drop_kept(self) -> None:
        """Of the checkpoints that a population has set aside, remove all but each trial's last two and those that a
        trial starts from."""
        if self.config.scheduler != "pbt":
            return
        kept = self.trials / KEPT
        wanted = {
            PurePosixPath(record.start["checkpoint"]).name
            for record in self.journal.trials.values()
            if record.start and not record.ended
        }
        of_trial: dict[int, list[str]] = {}
        for name in kept.children():
            if not name.endswith(PARTIAL) and (match := KEPT_NAME.fullmatch(name)):
                of_trial.setdefault(int(match[1]), []).append(name)
        for names in of_trial.values():
            for name in sorted(names, key=age_of_kept)[:-KEPT_PER_TRIAL]:
                if name not in wanted:
                    (kept / name).remove()
                    log.debug("removed %s, which was set aside", name)


def age_of_kept(name: str) -> tuple[int, int]:
    """Sort key of a checkpoint that was set aside: how often its trial's weights had been replaced, and the epoch."""
    match = KEPT_NAME.fullmatch(name)
    assert match is not None, name
    return int(match[2] or 0), int(match[3])
