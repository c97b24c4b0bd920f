"""The images of a run: where they are, whether they are whole, and whether the settings fit them."""

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

EMBEDDED = "digits"


class Dataset:
    """The shards that the settings name; the embedded digits are kept with the runs, and made when they are needed."""

    def __init__(self, config: TrainConfig, output: StoragePath, *, verify: bool = True) -> None:
        """Raises ValueError of one line where they are not there, or do not fit; DamagedData where they are broken."""
        self._labels: list[tuple[int, int]] | None = None  # of the shards, once they have been read
        embedded = config.data == EMBEDDED
        self.folder = output / "_data" / EMBEDDED if embedded else StoragePath.of(config.data)
        self.to_prepare = embedded and (self.folder / shards.MANIFEST).size() is None
        if self.to_prepare:
            source = open_source(EMBEDDED)
            self.name, self.classes, self.image_size = f"the {EMBEDDED}", len(source.classes), source.image_size
            self.rows = {split: len(entries) for split, entries in source.splits.items()}
        else:
            self._take(read_manifest(self.folder))
            if verify:
                # of a remote one only names and sizes: its bytes are read once an epoch, not once more before the first
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
        if config.input_size > self.image_size:
            raise ValueError(
                f"input_size = {config.input_size}: above the {self.image_size} pixels of {self.name}; choose at most "
                f"{self.image_size}, or prepare the data with --image-size {config.input_size} or more"
            )
        if config.global_batch_size > self.rows["train"]:
            raise ValueError(
                f"global_batch_size = {config.global_batch_size}: more than the {self.rows['train']} training images "
                f"among {self.name}"
            )

    def num_classes(self, config: TrainConfig) -> int:
        """Outputs of the net."""
        return config.num_classes or self.classes

    def prepare(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        """Make the embedded digits, if they are not there. Ray must be connected."""
        if self.to_prepare:
            say(f"preparing the embedded digits in {self.folder}")
            _make_whole(self.folder)
            self.to_prepare = False
            self._take(read_manifest(self.folder))
            self.check(config)

    def __str__(self) -> str:
        where = "embedded, prepared at the first run"
        if not self.to_prepare:
            where = f"{self.folder}, digest {self.manifest.digest}"
        return f"{self.rows['train']} train, {self.rows['val']} val, {self.classes} classes ({where})"

    def _take(self, manifest: Manifest) -> None:
        self.manifest, self.rows, self.classes = manifest, manifest.rows, len(manifest.classes)
        self.name, self.image_size = f"the images in {self.folder}", manifest.image_size


def _make_whole(place: StoragePath) -> None:
    """Make the digits beside their place and move them there whole; another run may be doing the same. In object
    storage the manifest comes last, and says that they are whole."""
    if place.local is None:
        prepare(open_source(EMBEDDED), place)
        return
    folder = place.local
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
        prepare(open_source(EMBEDDED), StoragePath.of(Path(making, EMBEDDED)))
        with contextlib.suppress(OSError):  # it is there already
            os.rename(Path(making, EMBEDDED), folder)
