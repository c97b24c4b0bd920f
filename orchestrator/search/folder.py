"""A search's folder, OUTPUT/NAME."""

from orchestrator.search.config import SearchConfig, search_of
from orchestrator.train.run_folder import RunFolder

SEARCH_YAML, BEST_YAML = "search.yaml", "best.yaml"
# folders: the trials' runs; what Ray Tune keeps, of which nothing is needed
TRIALS, TUNES_OWN = "trials", "_tune"


class SearchFolder(RunFolder):
    """OUTPUT/NAME of a search."""

    def search(self) -> SearchConfig:
        """Of a search that was created before. Raises ValueError where there is none."""
        return search_of(self.settings(SEARCH_YAML, "search"), str(self.path / SEARCH_YAML))

    def create_search(self, config: SearchConfig) -> None:
        """Raises ValueError where the name is taken."""
        self.make()
        self.change_search(config)

    def change_search(self, config: SearchConfig) -> None:
        self.write(SEARCH_YAML, config.to_yaml())
