"""The order of an epoch, and the feed that runs it on Ray Data."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch

from alexnet import augment
from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.data.feed import Feed
from orchestrator.data.order import plan_epoch, plan_probe, plan_validation, rank_slice, rows_of_pass
from orchestrator.data.reader import TaskReader
from orchestrator.data.shards import DamagedData
from orchestrator.train.device_batches import to_device

GROUPS = np.array([128, 128, 7, 128, 50, 1])


def pairs(order):
    return list(zip(order.group.tolist(), order.row.tolist(), strict=True))


def everything():
    return [(g, r) for g, rows in enumerate(GROUPS) for r in range(rows)]


@pytest.mark.parametrize("window", [1, 100, 200, 10_000])
def test_a_plan_holds_every_row_once(window):
    plan = plan_epoch(GROUPS, seed=3, epoch=1, window=window)
    assert sorted(pairs(plan)) == everything()
    assert pairs(plan) != everything()


def test_validation_is_every_row_as_stored():
    assert pairs(plan_validation(GROUPS)) == everything()


def test_a_probe_is_whole_row_groups_drawn_by_the_seed_alone():
    plans = [pairs(plan_probe(GROUPS, seed=seed, num_rows=200)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    for plan in plans:
        assert len(set(plan)) == len(plan) == 200
        assert set(plan) <= set(everything())
        groups = list(dict.fromkeys(group for group, _ in plan))
        for group in groups[:-1]:
            assert [row for g, row in plan if g == group] == list(range(GROUPS[group]))
    assert sorted(pairs(plan_probe(GROUPS, seed=0, num_rows=int(GROUPS.sum())))) == everything()


@pytest.mark.parametrize(
    ("train", "val", "probe"),
    [(1437, 360, 71), (9469, 3925, 473), (1_281_167, 50_000, 10_000), (500, 20, 20), (5, 3, 1)],
)
def test_a_probe_has_the_rows_of_val_but_at_most_a_twentieth_of_those_of_train_and_10_000(train, val, probe):
    rows = {"train": train, "val": val}
    assert [rows_of_pass(kind, rows) for kind in ("train", "val", "probe")] == [train, val, probe]


def test_a_plan_is_a_function_of_seed_and_epoch():
    plans = [pairs(plan_epoch(GROUPS, seed=s, epoch=e, window=200)) for s, e in [(0, 0), (0, 0), (0, 1), (1, 0)]]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]


def test_neighbours_of_a_shard_end_up_far_apart():
    rows = np.full(40, 128)
    plan = plan_epoch(rows, seed=0, epoch=0, window=2048)
    place = np.argsort(plan.group * 128 + plan.row)  # where each stored row stands in the plan
    distance = np.abs(np.diff(place))
    within = distance.reshape(-1)[np.arange(len(distance)) % 128 != 127]
    assert np.median(within) > 2048 / 5  # a full shuffle of the window has a median of 0.29 of it


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 23, 24, 25, 100])
def test_the_workers_slices_tile_every_batch(world, rows):
    size = 24
    steps = -(-rows // size)
    seen = []
    for step in range(steps):
        parts = [rank_slice(step, rows, size, rank, world) for rank in range(world)]
        assert all(lo <= hi for lo, hi in parts)
        assert max(hi - lo for lo, hi in parts) - min(hi - lo for lo, hi in parts) <= 1
        seen += [position for lo, hi in parts for position in range(lo, hi)]
    assert seen == list(range(rows))


def feed_for(digit_shards, config, rank, world, first_epoch=0, first_step=0):
    folder, manifest = digit_shards
    feed = Feed(
        StoragePath.of(folder), manifest, config, rank=rank, world_size=world, num_cpus=0.25, num_tasks=1, passes=PASSES
    )
    feed.start(first_epoch, first_step)
    STARTED.append(feed)
    return feed


PASSES = ("train", "val", "probe")
STARTED: list[Feed] = []


@pytest.fixture(scope="module", autouse=True)
def closed():
    """No feed outlives the Ray that it runs on."""
    yield
    for feed in STARTED:
        feed.close()


def take(feed, epochs, first_epoch=0):
    """All batches of some epochs, by (epoch, split)."""
    return {
        (epoch, split): list(feed.batches(split, epoch)) for epoch in range(first_epoch, epochs) for split in PASSES
    }


CONFIG = digits().changed(epochs=2, global_batch_size=60, flip=True, color_noise="paper")


@pytest.fixture(scope="module")
def one(digit_shards):
    """Two epochs as a single worker gets them."""
    return take(feed_for(digit_shards, CONFIG, 0, 1), 2)


@pytest.mark.ray
def test_images_that_are_sent_whole_and_cut_where_the_net_is_are_the_same_in_every_bit(digit_shards, one):
    whole = take(feed_for(digit_shards, CONFIG.changed(epochs=1, augment_on="device"), 0, 1), 1)
    for key, batches in whole.items():
        for batch, wanted in zip(batches, one[key], strict=True):
            placed, side = to_device(batch, torch.device("cpu")), CONFIG.crop_size
            assert placed.image.shape[1:] == (digit_shards[1].image_size, digit_shards[1].image_size, 3)
            top, left, flip, label = placed.cut.unbind(1)
            cut = augment.crop_flip_shift_tensors(placed.image, top, left, flip.bool(), placed.shift, side)
            assert np.array_equal(cut.numpy(), wanted["image"])
            assert np.array_equal(label.numpy(), wanted["label"])
    assert any(batch["shift"].any() for batch in whole[0, "train"])


@pytest.mark.ray
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_number_of_workers_gets_the_same_bytes_in_every_step(digit_shards, one, world):
    workers = [take(feed_for(digit_shards, CONFIG, rank, world), 2) for rank in range(world)]
    for key, batches in one.items():
        for step, batch in enumerate(batches):
            parts = [worker[key][step] for worker in workers]
            for name, column in batch.items():
                assert np.concatenate([part[name] for part in parts]).tobytes() == column.tobytes(), (key, step, name)


@pytest.mark.ray
def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own(digit_shards, one):
    again = take(feed_for(digit_shards, CONFIG, 0, 1), 2)
    ids = {key: np.concatenate([batch["id"] for batch in batches]) for key, batches in one.items()}
    stored = {"train": set(range(1797)) - set(ids[0, "val"].tolist()), "val": set(ids[0, "val"].tolist())}
    assert {split: len(found) for split, found in stored.items()} == digit_shards[1].rows
    for (epoch, split), found in ids.items():
        if split == "probe":
            continue
        assert sorted(found.tolist()) == sorted(stored[split]), (epoch, split)
        assert np.array_equal(found, np.concatenate([batch["id"] for batch in again[epoch, split]]))
    assert not np.array_equal(ids[0, "train"], ids[1, "train"])
    assert np.array_equal(ids[0, "val"], ids[1, "val"])
    assert not np.array_equal(one[0, "train"][0]["image"], one[1, "train"][0]["image"])


@pytest.mark.ray
def test_the_probe_is_the_same_training_images_in_every_epoch_cut_as_validation_images(digit_shards, one):
    """Against the shards, read here without the feed."""
    folder, manifest = digit_shards
    found = [
        {name: np.concatenate([batch[name] for batch in one[epoch, "probe"]]) for name in one[0, "probe"][0]}
        for epoch in (0, 1)
    ]
    assert all(found[0][name].tobytes() == found[1][name].tobytes() for name in found[0])
    assert len(found[0]["id"]) == len(set(found[0]["id"].tolist())) == 71
    rows = {row["id"]: row for s in manifest.split("train") for row in pq.read_table(folder / s.file).to_pylist()}
    margin = (manifest.image_size - 64) // 2
    for image, label, number in zip(*(found[0][name] for name in ("image", "label", "id")), strict=True):
        stored = simplejpeg.decode_jpeg(rows[number]["image"], "RGB")
        assert np.array_equal(image, stored[margin : margin + 64, margin : margin + 64])
        assert label == rows[number]["label"]
    assert not found[0]["flip"].any()


@pytest.mark.ray
@pytest.mark.parametrize(("epoch", "step"), [(0, 7), (1, 0), (1, 23)])
def test_a_feed_that_resumes_at_a_step_continues_with_the_same_bytes(digit_shards, one, epoch, step):
    feed = feed_for(digit_shards, CONFIG, 0, 1, epoch, step)
    for ours, theirs in zip(feed.batches("train", epoch, step), one[epoch, "train"][step:], strict=True):
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    feed.close()


@pytest.mark.ray
def test_a_feed_that_is_closed_in_the_middle_leaves_nothing_running(digit_shards):
    import threading

    feed = feed_for(digit_shards, CONFIG.changed(epochs=50), 0, 1)
    next(feed.batches("train", 0))
    feed.close()
    assert not any(thread.name == "feed" for thread in threading.enumerate())


@pytest.mark.ray
def test_a_short_last_batch_may_leave_a_worker_nothing(digit_shards):
    config = digits().changed(epochs=1, global_batch_size=1436, workers=2)  # 1,437 rows: one is left
    parts = [take(feed_for(digit_shards, config, rank, 2), 1)[0, "train"] for rank in range(2)]
    assert [len(worker[-1]["label"]) for worker in parts] == [0, 1]
    assert parts[0][-1]["image"].shape == (0, 64, 64, 3)


@pytest.mark.ray
def test_images_and_labels_belong_together(digit_shards):
    """Every row of val, decoded here without the feed, equals what the feed delivers."""
    import pyarrow.parquet as pq

    from alexnet import images

    folder, manifest = digit_shards
    batches = take(feed_for(digit_shards, digits().changed(epochs=1), 0, 1), 1)[0, "val"]
    rows = [row for shard in manifest.split("val") for row in pq.read_table(folder / shard.file).to_pylist()]
    assert np.concatenate([b["label"] for b in batches]).tolist() == [row["label"] for row in rows]
    expected = np.array([images.decode(row["image"])[4:68, 4:68] for row in rows])
    assert np.array_equal(np.concatenate([b["image"] for b in batches]), expected)


@pytest.mark.ray
def test_a_lost_row_is_an_error_not_a_shorter_epoch(digit_shards):
    feed = feed_for(digit_shards, digits().changed(epochs=1), 0, 1)
    feed._take(1)
    with pytest.raises(AssertionError, match="are not the plan's"):
        next(feed.batches("train", 0))


@pytest.mark.ray
def test_a_feed_that_ends_early_is_an_error_not_a_wait(digit_shards):
    feed = feed_for(digit_shards, digits().changed(epochs=1), 0, 1)
    take(feed, 1)
    with pytest.raises(RuntimeError, match="ended before the run"):
        feed._take(1)


@pytest.mark.ray
def test_a_shard_that_vanishes_while_training_reaches_the_consumer(digit_shards, tmp_path):
    _, manifest = digit_shards
    feed = Feed(
        StoragePath.of(tmp_path), manifest, digits().changed(epochs=1), rank=0, world_size=1, num_cpus=0.25, num_tasks=1
    )
    feed.start(0)
    with pytest.raises(JobError, match=r"shard-0000\d\.parquet") as error:
        next(feed.batches("train", 0))
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, DamagedData), "a disk may come back"


@pytest.mark.ray
def test_a_damaged_image_is_no_crash_that_could_be_tried_again(digit_shards, tmp_path):
    folder, manifest = digit_shards
    for shard in manifest.shards:
        rows = pq.read_table(folder / shard.file)
        images = [b"no image" for _ in range(rows.num_rows)]
        rows = rows.set_column(rows.schema.get_field_index("image"), "image", pa.array(images, rows["image"].type))
        (tmp_path / shard.file).parent.mkdir(exist_ok=True)
        pq.write_table(rows, tmp_path / shard.file, row_group_size=shard.row_groups[0])
    feed = Feed(
        StoragePath.of(tmp_path), manifest, digits().changed(epochs=1), rank=0, world_size=1, num_cpus=0.25, num_tasks=1
    )
    feed.start(0)
    with pytest.raises(DamagedData, match=r"shard-0000\d\.parquet, row group \d+: image \d+ cannot be decoded"):
        next(feed.batches("train", 0))
    feed.close()


def test_the_reader_needs_no_torch():
    """Ray Data's processes start quickly because they import nothing heavy."""
    import subprocess
    import sys

    code = "import sys, orchestrator.data.feed, alexnet.augment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert TaskReader.__module__ == "orchestrator.data.reader"
