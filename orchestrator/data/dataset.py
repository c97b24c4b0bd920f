"""A run's data set: where its shards are, whether they are intact, and whether the settings fit them."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data import shards
from orchestrator.data.prepare import prepare
from orchestrator.data.shards import Manifest, read_manifest
from orchestrator.data.sources import open_source

BUNDLED = "digits"


def with_absolute_data(config: TrainConfig) -> TrainConfig:
    """The settings with a folder of this machine as an absolute path: they may be read again in another folder."""
    if config.data == BUNDLED or "://" in config.data:
        return config
    return config.changed(data=str(StoragePath.of(config.data)))


def shards_of(config: TrainConfig, output: StoragePath) -> StoragePath:
    """Where the shards are that the settings name. Those of the bundled digits are kept with the runs."""
    return bundled(output) if config.data == BUNDLED else StoragePath.of(config.data)


def bundled(output: StoragePath) -> StoragePath:
    """Where the bundled digits are, of runs in this folder."""
    return output / "_data" / BUNDLED


class Dataset:
    """The shards that the settings name. Those of the bundled digits are kept with the runs, and made when needed."""

    def __init__(self, config: TrainConfig, output: StoragePath, *, verify: bool = True) -> None:
        """Raises ValueError of one line if there are no shards or the settings do not fit, DamagedData for damage."""
        self._labels: list[tuple[int, int]] | None = None  # of each shard the least and the greatest, once read
        self.folder = shards_of(config, output)
        self.to_prepare = config.data == BUNDLED and (self.folder / shards.MANIFEST).size() is None
        if self.to_prepare:
            source = open_source(BUNDLED)
            self.name, self.classes, self.image_size = f"the {BUNDLED}", len(source.classes), source.image_size
            self.rows = {split: len(entries) for split, entries in source.splits.items()}
        else:
            self._take(read_manifest(self.folder))
            if verify:
                # of remote shards only presence and size: their bytes are read in every epoch, and not once more here
                shards.verify(self.folder, self.manifest, whole=self.folder.local is not None)
        self.check(config)

    def check(self, config: TrainConfig) -> None:
        """Check settings against the data. Raises ValueError of one line."""
        if self.to_prepare:
            if config.num_classes is not None and config.num_classes < self.classes:
                raise ValueError(f"num_classes = {config.num_classes}: {self.name} have {self.classes} classes")
        else:
            if self._labels is None:
                self._labels = shards.label_ranges(self.folder, self.manifest)
            shards.check_labels(self.folder, self.manifest, self._labels, config.num_classes or self.classes)
        if config.crop_size > self.image_size:
            raise ValueError(
                f"input_size = {config.crop_size}: larger than the {self.image_size} pixels of {self.name}; choose at "
                f"most {self.image_size}, or prepare the data with --image-size {config.crop_size} or more"
            )
        if config.global_batch_size > self.rows["train"]:
            raise ValueError(
                f"global_batch_size = {config.global_batch_size}: more than the {self.rows['train']} training images "
                f"of {self.name.removeprefix('the images in ')}; pass --global-batch-size {self.rows['train']} or less"
            )

    def num_classes(self, config: TrainConfig) -> int:
        """How many outputs the net has."""
        return config.num_classes or self.classes

    def prepare(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        """Make the shards of the bundled digits if they are not there. Ray must be connected."""
        if self.to_prepare:
            say(f"preparing the bundled digits in {self.folder}")
            _make_digits(self.folder)
            self.to_prepare = False
            self._take(read_manifest(self.folder))
            self.check(config)

    def __str__(self) -> str:
        where = "bundled, prepared by the first run"
        if not self.to_prepare:
            where = f"{self.folder}, digest {self.manifest.digest}"
        return f"{self.rows['train']} train, {self.rows['val']} val, {self.classes} classes ({where})"

    def _take(self, manifest: Manifest) -> None:
        self.manifest, self.rows, self.classes = manifest, manifest.rows, len(manifest.classes)
        self.name, self.image_size = f"the images in {self.folder}", manifest.image_size


def _make_digits(place: StoragePath) -> None:
    """Make the digits' shards beside their folder, then move them there at once: another run may be doing the same.

    In object storage they are made in place, and the manifest, which comes last, tells that they are complete.
    """
    if place.local is None:
        prepare(open_source(BUNDLED), place)
        return
    folder = place.local
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
        prepare(open_source(BUNDLED), StoragePath.of(Path(making, BUNDLED)))
        with contextlib.suppress(OSError):  # another run was faster
            os.rename(Path(making, BUNDLED), folder)
