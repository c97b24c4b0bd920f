"""A source to shards, on Ray Data.

The order is drawn once, from a seed; each shard is a task over consecutive entries of it (shard_writer.py). A task that
is done leaves a note beside the data, so that a preparation that was interrupted makes only what is missing. The
manifest is written last.
"""

import collections
import hashlib
import io
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from alexnet.images import COUNTED, WHITE, WORDNET_ID
from orchestrator.base.exits import JobError, last_line
from orchestrator.base.shown import shown
from orchestrator.base.storage import StoragePath
from orchestrator.data.order import plan_epoch
from orchestrator.data.read_ahead import in_runs
from orchestrator.data.shard_writer import ShardWriter, pack
from orchestrator.data.shards import MANIFEST, MEAN_IMAGE, REJECTED, SHEETS, UNFINISHED, Manifest, Shard, verify
from orchestrator.data.sources import SPLITS, Drawn, Source
from orchestrator.data.sources.tree import IMAGES, extension

ROWS_PER_SHARD = 1024
JPEG_QUALITY = 90
DRAWN = "drawn.json"  # in UNFINISHED: what was drawn for validation
OURS = re.compile(r"shard-\d{5,}\.parquet|\.shard-\d{5,}\.parquet\.[0-9a-f]{8}\.partial")  # files written here
BITS_PER_PIXEL = {75: 1.49, 85: 1.98, 90: 2.47, 95: 3.52, 100: 6.66}  # of photographs, by JPEG quality (docs/data.md)
SPARE = 1.1  # factor on the disk space: photographs differ


class Progress(BaseModel):
    """How far a preparation is."""

    images_done: int
    images_kept: int  # those of them that an earlier attempt had made
    images_total: int
    rejected: int
    guessed: int = 0  # images whose range of pixel values is not known
    first_guessed: str = ""  # a line about the first of them by name
    elapsed_s: float


def prepare(
    source: Source,
    output: StoragePath,
    *,
    image_size: int | None = None,
    seed: int = 0,
    encoding: str = "jpeg",
    jpeg_quality: int = JPEG_QUALITY,
    rows_per_shard: int = ROWS_PER_SHARD,
    max_rejected: float = 0.01,
    parallelism: int | None = None,
    exif: str | None = None,
    background: tuple[int, int, int] = WHITE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Read every image of the source and write the shards: the same bytes whatever the parallelism.

    Shards of an earlier attempt with the same settings are kept. All sums are of integers, so they do not depend on
    which task ends first. Ray must be connected. exif: "apply" or "ignore"; None for what `exif_rule` says.

    Raises JobError if more than the fraction `max_rejected` of the files could not be read; the list is then in
    output/rejected.jsonl, and there is no manifest.
    """
    import ray.data

    size = image_size or source.image_size
    (output / MANIFEST).remove()
    if source.drawn is not None and source.drawn.digest:
        (output / UNFINISHED / DRAWN).write(json.dumps(source.drawn.to_json()).encode())
    tasks = list(_tasks(in_runs(source), seed, rows_per_shard))
    quality = jpeg_quality if encoding == "jpeg" else None
    turn = (exif or exif_rule(source)) == "apply"
    write = ShardWriter(output, size, quality, len(source.classes), exif=turn, background=background)
    kinds: collections.Counter[str] = collections.Counter()
    shards: list[Shard] = []
    rejected = [{"name": shown(name, None), "reason": shown(reason, None)} for name, reason in source.misplaced]
    guessed, first_guessed = 0, ""
    total = sum(len(entries) for entries in source.splits.values())
    sums = np.zeros((size, size, 3), np.int64)
    products = np.zeros((3, 3), np.int64)
    class_rows = {split: np.zeros(len(source.classes), np.int64) for split in SPLITS}
    start, done, kept = time.monotonic(), 0, 0
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        write, compute=ray.data.TaskPoolStrategy(size=min(parallelism, len(tasks)) if parallelism else None)
    )
    for result in _results(dataset):
        report = json.loads(result["report"])
        rejected.extend(report["rejected"])
        lines = report.get("guessed", ())  # notes of version 0 have none
        guessed += len(lines)
        first_guessed = min([*lines, first_guessed] if first_guessed else lines, default="")
        kinds.update(report.get("counts", {}))
        if report["shard"]["split"] == "train":
            sums += result["sums"]
            products += result["products"]
        class_rows[report["shard"]["split"]] += np.array(report["class_rows"], np.int64)
        if report["shard"]["rows"]:
            shards.append(Shard(**report["shard"]))
        done += report["images"]
        kept += report["images"] if result["kept"] else 0
        on_progress(
            Progress(
                images_done=done, images_kept=kept, images_total=total, rejected=len(rejected), guessed=guessed,
                first_guessed=first_guessed, elapsed_s=time.monotonic() - start,
            )
        )  # fmt: skip
    shards.sort(key=lambda shard: (SPLITS.index(shard.split), shard.file))
    (output / REJECTED).write(_rejected_list(source, rejected))
    rows = {split: sum(shard.rows for shard in shards if shard.split == split) for split in SPLITS}
    considered = total + len(source.misplaced)
    if empty := [split for split, count in rows.items() if not count]:
        raise JobError(f"no image of {empty[0]} could be read; the reasons are in {output / REJECTED}")
    if len(rejected) > max_rejected * considered:
        raise JobError(
            f"{len(rejected)} of {considered} files could not be read, more than --max-rejected {max_rejected:g}; "
            f"they are listed in {output / REJECTED}"
        )
    counted = {split: tuple(counts.tolist()) for split, counts in class_rows.items()}
    manifest = _describe(source, shards, rows, counted, len(rejected), size, quality, seed, sums, products, output)
    counted_kinds = {kind: kinds[kind] for kind in COUNTED if kinds[kind]}
    manifest = manifest.model_copy(update={"kinds": counted_kinds, "exif": "apply" if turn else "ignore"}).sealed()
    verify(output, manifest, whole=False)  # on a cluster, an output that is not shared would hold only a part here
    _remove_leftovers(output, manifest)
    (output / MANIFEST).write((manifest.model_dump_json(indent=1) + "\n").encode())
    (output / UNFINISHED).remove()
    return manifest


def exif_rule(source: Source) -> str:
    """Whether images are turned by their EXIF orientation unless the user says so: not those of ImageNet or CIFAR."""
    imagenet = source.format == "imagefolder" and all(WORDNET_ID.fullmatch(name) for name in source.classes)
    return "ignore" if source.format in ("ilsvrc", "cifar10") or imagenet else "apply"


def earlier_draw(output: StoragePath) -> Drawn | None:
    """What an interrupted preparation to this output has drawn for validation; None if there is none that can be
    read."""
    place = output / UNFINISHED / DRAWN
    if place.size() is None:
        return None
    try:
        return Drawn.of_json(json.loads(place.read()))
    except (ValueError, RecursionError):  # of another version, or cut off: it is drawn again
        return None


def _rejected_list(source: Source, rejected: list[dict[str, str]]) -> bytes:
    """The content of REJECTED: what could not be read, by name, then what was left out."""
    left_out = [
        {"name": shown(name, None), "reason": shown(rule, None), "kind": "left out"} for name, rule in source.left_out
    ]
    rows = [*sorted(rejected, key=lambda row: row["name"]), *left_out]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def check_rejected(source: Source, max_rejected: float, output: StoragePath | None = None) -> None:
    """Raises ValueError where more files of a listing have no class or label than may be rejected; all of them are
    then listed in the output, if there is one."""
    count, rejected = sum(map(len, source.splits.values())) + len(source.misplaced), len(source.misplaced)
    if rejected > max_rejected * count:
        name, reason = source.misplaced[0]
        where = ""
        if output is not None:
            # a data set that is still there has a list of its own
            place = output / (REJECTED if (output / MANIFEST).size() is None else f"{UNFINISHED}/{REJECTED}")
            rows = [{"name": shown(name, None), "reason": shown(reason, None)} for name, reason in source.misplaced]
            place.write(_rejected_list(source, rows))
            where = f"; they are listed in {place}"
        raise ValueError(
            f"--source {source.name}: {rejected} of {count} files have no class or label, more than --max-rejected "
            f"{max_rejected:g}; such as {name}: {reason}{where}"
        )


def bytes_needed(source: Source, image_size: int, jpeg_quality: int | None, rows_per_shard: int) -> int:
    """Roughly the disk space that a preparation takes: the shards, and its notes."""
    count = sum(len(entries) for entries in source.splits.values())
    bits = 24.0
    if jpeg_quality is not None:
        known = sorted(BITS_PER_PIXEL)
        bits = float(np.interp(jpeg_quality, known, [BITS_PER_PIXEL[quality] for quality in known]))
    shards = count * image_size**2 * bits / 8
    notes = 3 * 4 * image_size**2 * -(-count // rows_per_shard)
    return int(SPARE * (shards + notes))


def check_apart(source: str, output: StoragePath) -> None:
    """Raises ValueError of one line if the output is a file, or the shards would be written over the images or among
    them."""
    if output.local is not None and output.local.is_file():
        raise ValueError(f"--output {output}: is a file; give a folder")
    if "://" not in source and output.local is not None:
        images_at, shards_at = Path(source).resolve(), output.local.resolve()
    else:
        images_at, shards_at = Path(source.partition("?")[0]), Path(output.text.partition("?")[0])
    within = [place for place in (shards_at, *shards_at.parents) if place != images_at and images_at in place.parents]
    if (
        shards_at == images_at
        or any(shards_at.is_relative_to(images_at / split) for split in SPLITS)
        or (output.local is not None and any(map(_holds_images, within)))
    ):
        raise ValueError(f"--output {output}: holds the images of --source; choose another folder")


def _holds_images(folder: Path) -> bool:
    try:
        names = [each.name for each in os.scandir(folder) if each.is_file()]
    except OSError:
        return False  # it is not there, or writing into it will fail
    return any(extension(name) in IMAGES and name not in SHEETS for name in names)


def check_space(
    source: Source, output: StoragePath, image_size: int, jpeg_quality: int | None, rows_per_shard: int
) -> None:
    """Raises ValueError of one line if the disk has too little space for the shards."""
    free = output.free_bytes()
    needed = bytes_needed(source, image_size, jpeg_quality, rows_per_shard)
    there = 0
    if output.local is not None and output.local.is_dir():
        there = sum(path.stat().st_size for split in SPLITS for path in output.local.glob(f"{split}/shard-*.parquet"))
    if free is not None and free + there < needed:
        raise ValueError(
            f"--output {output}: the shards need about {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB "
            "free; choose another disk, a smaller --image-size or a lower --jpeg-quality"
        )


def _results(dataset: Any) -> Iterator[dict[str, Any]]:
    """What the tasks return. Raises JobError with the reason if one failed, for want of disk space, say."""
    rows: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def fetch() -> None:  # in a thread: a signal must neither wait for a shard nor interrupt a call into Ray
        try:
            for row in dataset.iter_rows():
                rows.put(row)
            rows.put(None)
        except BaseException as error:
            rows.put(error)

    threading.Thread(target=fetch, name="shards", daemon=True).start()
    while (row := rows.get()) is not None:
        failure = last_line(row) if isinstance(row, BaseException) else row["failure"]
        if failure:
            raise JobError(f"writing shards failed: {failure}; finished shards are kept for another try")
        yield row


def _tasks(source: Source, seed: int, rows_per_shard: int) -> Iterator[dict[str, bytes]]:
    """One task per shard: consecutive entries of the shuffled listing."""
    for number, split in enumerate(SPLITS):
        entries = source.splits[split]
        order = _order(source, split, [seed, number], rows_per_shard)
        for index, first in enumerate(range(0, len(order), rows_per_shard)):
            chosen = [entries[i] for i in order[first : first + rows_per_shard]]
            yield pack(split, f"{split}/shard-{index:05d}.parquet", chosen)


def _order(source: Source, split: str, seed: list[int], rows_per_shard: int) -> NDArray[np.int64]:
    """A permutation of the listing; of Parquet files, one that takes a shard's rows from a few row groups.

    The row groups are drawn from all of them, and training draws its own from all shards, so that even a table sorted
    by class is well mixed.
    """
    runs = source.runs[split] if source.runs else None
    if runs is None:
        permutation: NDArray[np.int64] = np.random.default_rng(seed).permutation(len(source.splits[split]))
        return permutation
    lengths = np.array(runs, np.int64)
    order = plan_epoch(lengths, seed=seed[0], epoch=seed[1], window=rows_per_shard)
    place: NDArray[np.int64] = (np.cumsum(lengths) - lengths)[order.group] + order.row
    return place


def _remove_leftovers(output: StoragePath, manifest: Manifest) -> None:
    """Remove the shards of attempts with other settings, which the manifest does not name."""
    named = {shard.file for shard in manifest.shards}
    for split in SPLITS:
        for name in (output / split).children():
            if OURS.fullmatch(name) and f"{split}/{name}" not in named:
                (output / split / name).remove()


def _describe(
    source: Source,
    shards: list[Shard],
    rows: dict[str, int],
    class_rows: dict[str, tuple[int, ...]],
    num_rejected: int,
    size: int,
    jpeg_quality: int | None,
    seed: int,
    sums: NDArray[np.int64],
    products: NDArray[np.int64],
    output: StoragePath,
) -> Manifest:
    """The manifest; also writes the mean image, whose checksum is in it."""
    pixels = rows["train"] * size * size
    mean = sums.sum(axis=(0, 1)) / pixels
    covariance = products / pixels - np.outer(mean, mean)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    eigenvalues, eigenvectors = eigenvalues[::-1], eigenvectors[:, ::-1]
    largest = eigenvectors[np.abs(eigenvectors).argmax(axis=0), np.arange(3)]
    eigenvectors = eigenvectors * np.sign(largest)  # the sign is arbitrary: make it the same everywhere
    mean_image = io.BytesIO()
    np.save(mean_image, (sums / rows["train"]).astype(np.float32), allow_pickle=False)
    (output / MEAN_IMAGE).write(mean_image.getvalue())
    return Manifest(
        source=shown(source.name),
        found=tuple(map(shown, source.found)),  # names of files may be no text
        left_out=dict(sorted(collections.Counter(shown(rule) for _, rule in source.left_out).items())),
        warnings=tuple(map(shown, source.warnings)),
        classes=source.classes,
        class_names=source.class_names,
        image_size=size,
        encoding="raw" if jpeg_quality is None else "jpeg",
        jpeg_quality=jpeg_quality,
        seed=seed,
        rows=rows,
        class_rows=class_rows,
        rejected=num_rejected,
        mean_rgb=tuple(mean.tolist()),
        covariance_rgb=tuple(map(tuple, covariance.tolist())),
        eigenvalues=tuple(eigenvalues.tolist()),
        eigenvectors=tuple(map(tuple, eigenvectors.tolist())),
        mean_image_sha256=hashlib.sha256(mean_image.getvalue()).hexdigest(),
        shards=tuple(shards),
    )
