"""What is fuzzed: by format, sound files, the damage that suits it, and the calls by which prepare, train and tune read
such a file."""

import functools
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import pytest
import seeds

import alexnet
from alexnet import images
from alexnet.layouts import Layout, ShardedNet
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.prices import node_types
from orchestrator.config.models import parse_yaml
from orchestrator.config.recipes import digits
from orchestrator.config.train import make_config
from orchestrator.data import decoder, sandbox
from orchestrator.data.reader import read_row_group
from orchestrator.data.shards import read_manifest
from orchestrator.data.sources import Options, listing, open_source
from orchestrator.data.sources.apart import open_apart, packed, unpacked
from orchestrator.data.sources.devkit import DEVKIT, read_meta, read_small_archive
from orchestrator.models.label_sets import read_label_sets
from orchestrator.models.shard_rows import Rows
from orchestrator.search.config import search_of
from orchestrator.train import checkpoints
from orchestrator.train.model import build_net
from orchestrator.train.run_folder import RunFolder

CRASHING = (".parquet", ".arrow")  # readers in C++, which are known to crash; the others are read here, which is faster
SIDE = 64  # pixels of the images that are made
Damage = Callable[[bytes, list[bytes], random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A format."""

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]  # in an empty folder; raises what an entry point raises
    damage: Damage = mutate.damaged


def decode(data: bytes, folder: Path) -> object:
    pixels = images.resize_and_center(images.decode(data, exif=True), SIDE)
    assert pixels.shape == (SIDE, SIDE, 3)
    return images.encode(pixels, 90)


def prepared(name: str, beside: dict[str, bytes] | None = None, options: Options | None = None) -> Any:
    """A reader that makes shards of a source that holds the input as the file `name`, or is that file if there are no
    others beside it."""
    others = beside or {}

    def read(data: bytes, folder: Path) -> object:
        for below, content in (others | {name: data}).items():
            path = folder / "source" / below
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        source = folder / "source" if others else folder / "source" / name
        return make_shards(str(source), folder, options or Options())

    return read


def make_shards(place: str, folder: Path, options: Options) -> object:
    """As `prepare` does, but for Ray: its tasks are run here."""
    from orchestrator.data.prepare import prepare

    listing._recent.clear()
    source = (open_apart if place.endswith(CRASHING) else open_source)(place, options)
    for split, entries in source.splits.items():
        source.splits[split] = entries[:6]
    with_runs = source.runs and {split: [len(entries)] for split, entries in source.splits.items()}
    object.__setattr__(source, "runs", with_runs)
    output = StoragePath.of(folder / "shards")
    with pytest.MonkeyPatch.context() as here:
        here.setattr(decoder, "CAN_FORK", False)  # images have targets of their own
        made = prepare(source, output, image_size=SIDE, max_rejected=1.0)
    assert read_manifest(output) == made, "the manifest is read as another than was written"
    return True


class HereDataset:
    """In the place of Ray Data: rows and what is done to them."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def map(self, call: Callable[[Any], Any], **options: object) -> "HereDataset":
        self.call = call
        return self

    def iter_rows(self) -> Iterator[Any]:
        return map(self.call, self.rows)


def use_no_ray() -> None:
    import ray.data

    ray.data.from_items = lambda rows, **options: HereDataset(rows)


def fork_the_sandbox() -> None:
    """Have the sandbox's children forked, though Ray is imported here: starting an interpreter for each input would
    take most of the time."""
    import scipy.io  # noqa: F401  (here, not in every child)

    sandbox._begin = sandbox._Forked


def listing_of_a_stranger(data: bytes, folder: Path) -> object:
    """As the parent of a sandbox that was taken over."""
    return unpacked(data, StoragePath("/source"))


def listings() -> list[bytes]:
    entries = {
        "train": [
            listing.Entry(i, i % 2, f"train/{i}.jpg", path=f"/source/{i}.jpg", start=i, length=9) for i in range(4)
        ],
        "val": [listing.Entry(i, i % 2, f"val/{i}", data=b"x") for i in range(4, 6)],
    }
    return [packed(listing.Source("source", "tar", seeds.CLASSES, entries, misplaced=[("a", "b")], warnings=["w"]))]


def meta_mat(data: bytes, folder: Path) -> object:
    return read_meta(data, "meta.mat")


def devkit(data: bytes, folder: Path) -> object:
    (folder / DEVKIT).write_bytes(data)
    found = read_small_archive(StoragePath.of(folder / DEVKIT), {"meta.mat"})
    return read_meta(found["meta.mat"], "meta.mat") if "meta.mat" in found else None


@functools.cache
def cifar_files() -> dict[str, bytes]:
    return {f"data_batch_{i}": seeds.batch(1, i) for i in range(2, 6)} | {
        "test_batch": seeds.batch(2, 9), "data_batch_1": seeds.batch(2, 1), "batches.meta": seeds.cifar_meta(),
    }  # fmt: skip


def cifar_pickle(data: bytes, folder: Path) -> object:
    """As a batch, or as the names of the classes."""
    name = "batches.meta" if b"label_names" in data else "data_batch_1"
    return prepared(name, cifar_files())(data, folder)


def parse_manifest(data: bytes, folder: Path) -> object:
    (folder / "manifest.json").write_bytes(data)
    return read_manifest(StoragePath.of(folder))


def shard(data: bytes, folder: Path) -> object:
    """As the feed reads one, whose checksum was right: the worst that a damaged disk could do after that."""
    from orchestrator.data.shards import _label_range

    place = StoragePath.of(folder / mutate.name_of(data))
    place.write(data)
    _label_range(place)
    group = read_row_group(place, 0)
    rows = np.arange(len(group.labels))
    return [pixels.shape for pixels, _, _ in group.decoded(rows, rows, SIDE)]


def shard_seeds() -> list[bytes]:
    from orchestrator.data.shard_writer import ShardWriter

    pixels = [images.resize_and_center(images.decode(seeds.image(i)), SIDE) for i in range(4)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for quality in (90, None):
            data = [images.encode(p, quality) if quality else p.tobytes() for p in pixels]
            columns = {"image": data, "label": [0, 1, 0, 1], "id": [0, 1, 2, 3], "name": list("abcd")}
            place = StoragePath.of(Path(folder, "x"))
            ShardWriter(place, SIDE, quality, 2).write(place, columns)
            found.append(place.read())
    return found


def config_yaml(data: bytes, folder: Path) -> object:
    return make_config(**digits().model_dump() | parse_yaml(data, "--config x"))


def search_yaml(data: bytes, folder: Path) -> object:
    return search_of(parse_yaml(data, "search.yaml"), "search.yaml")


def cluster_yaml(data: bytes, folder: Path) -> object:
    (folder / "cluster.yaml").write_bytes(data)
    return node_types(folder / "cluster.yaml")


def result_json(data: bytes, folder: Path) -> object:
    (folder / "run").mkdir()
    (folder / "run/result.json").write_bytes(data)
    return RunFolder(folder, "run").result()


@functools.cache
def tiny_net() -> tuple[ShardedNet, alexnet.PaperSGD, Any]:
    net = ShardedNet(build_net(digits().changed(width=1 / 16), 2), Layout("single", 1))
    optimizer = alexnet.PaperSGD(net.parameters(), lr=0.01)
    return net, optimizer, alexnet.plateau_schedule(optimizer)


def checkpoint(name: str) -> Any:
    """A reader of a checkpoint whose file of this name is the input."""

    def read(data: bytes, folder: Path) -> object:
        for other, content in _checkpoint().items():
            (folder / other).write_bytes(data if other == name else content)
        return checkpoints.load(folder, *tiny_net())

    return read


_checkpoint = functools.cache(seeds.checkpoint)


def model_file(suffix: str) -> Any:
    """A reader of a net of one file."""

    def read(data: bytes, folder: Path) -> object:
        (folder / f"x{suffix}").write_bytes(data)
        return alexnet.load(folder / f"x{suffix}")

    return read


def net_json(data: bytes, folder: Path) -> object:
    for name, content in (seeds.model_folder() | {"net.json": data}).items():
        (folder / name).write_bytes(content)
    return alexnet.load(folder)


def label_sets(data: bytes, folder: Path) -> object:
    """As `evaluate --labels`."""
    (folder / "real.json").write_bytes(data)
    names = [f"val/{seeds.CLASSES[i % 2]}/{i}.jpg" for i in range(4)]
    rows = Rows(np.arange(4), np.arange(4) % 2, names)
    return read_label_sets(str(folder / "real.json"), rows, seeds.CLASSES)


def beside_a_table() -> dict[str, bytes]:
    return {f"{i}.jpg": seeds.image(i) for i in range(8)}


TARGETS = {
    "tar": Target(seeds.tar, prepared("x.tar"), mutate.tar),
    "webdataset": Target(seeds.webdataset, prepared("x.tar"), mutate.tar),
    "zip": Target(seeds.zip_archive, prepared("x.zip"), mutate.zip_archive),
    "devkit.tar.gz": Target(seeds.devkit, devkit, mutate.packed),
    "meta.mat": Target(seeds.meta_mat, meta_mat),
    "cifar": Target(seeds.cifar_pickle, cifar_pickle),
    "parquet": Target(seeds.parquet, prepared("x.parquet"), mutate.parquet),
    "arrow": Target(seeds.arrow, prepared("x.arrow")),
    "csv": Target(seeds.csv_table, prepared("labels.csv", beside_a_table()), mutate.text),
    "jsonl": Target(seeds.jsonl, prepared("metadata.jsonl", beside_a_table()), mutate.text),
    "caffe": Target(
        seeds.caffe, prepared("train.txt", beside_a_table() | {"val.txt": b"6.jpg 0\n7.jpg 1\n"}), mutate.text
    ),
    "listing": Target(listings, listing_of_a_stranger, mutate.listing),
    "jpeg": Target(seeds.jpeg, decode, mutate.jpeg),
    "progressive": Target(seeds.progressive_jpeg, decode, mutate.jpeg),
    "png": Target(seeds.png, decode, mutate.png),
    "tiff": Target(seeds.tiff, decode),
    "webp": Target(seeds.webp, decode),
    "gif": Target(seeds.gif, decode),
    "other-images": Target(seeds.other_images, decode),
    "manifest.json": Target(seeds.manifest, parse_manifest, mutate.sealed),
    "shard": Target(shard_seeds, shard, mutate.parquet),
    "config.yaml": Target(seeds.config_yaml, config_yaml, mutate.text),
    "search.yaml": Target(seeds.search_yaml, search_yaml, mutate.text),
    "cluster.yaml": Target(seeds.cluster_yaml, cluster_yaml, mutate.text),
    "result.json": Target(seeds.result_json, result_json, mutate.as_json),
    "state.json": Target(seeds.state_json, checkpoint("state.json"), mutate.as_json),
    ".caffemodel": Target(lambda: [seeds.model(".caffemodel")], model_file(".caffemodel")),
    ".pth": Target(lambda: [seeds.model(".pth")], model_file(".pth"), mutate.zip_archive),
    ".safetensors": Target(lambda: [seeds.model(".safetensors")], model_file(".safetensors"), mutate.safetensors),
    "net.json": Target(lambda: [seeds.model_folder()["net.json"]], net_json, mutate.as_json),
    "real.json": Target(seeds.label_sets, label_sets, mutate.as_json),
    "safetensors": Target(seeds.safetensors, checkpoint("model.safetensors"), mutate.safetensors),
}
