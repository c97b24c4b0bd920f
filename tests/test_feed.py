"""The plan of an epoch, and the feed that runs it on Ray Data."""

import numpy as np
import pytest

from orchestrator.feed import Feed, TaskReader, plan_epoch, plan_validation, worker_stretch
from orchestrator.recipes import digits

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
def test_the_workers_stretches_tile_every_batch(world, rows):
    size = 24
    steps = -(-rows // size)
    seen = []
    for step in range(steps):
        parts = [worker_stretch(step, rows, size, rank, world) for rank in range(world)]
        assert all(lo <= hi for lo, hi in parts)
        assert max(hi - lo for lo, hi in parts) - min(hi - lo for lo, hi in parts) <= 1
        seen += [position for lo, hi in parts for position in range(lo, hi)]
    assert seen == list(range(rows))


def feed_for(digit_shards, config, rank, world, first_epoch=0):
    folder, manifest = digit_shards
    feed = Feed(folder, manifest, config, rank=rank, world_size=world, num_cpus=0.25, num_tasks=1)
    feed.start(first_epoch)
    return feed


def take(feed, epochs, first_epoch=0):
    """All batches of some epochs, by (epoch, split)."""
    return {
        (epoch, split): list(feed.batches(split, epoch))
        for epoch in range(first_epoch, epochs)
        for split in ("train", "val")
    }


@pytest.mark.ray
def test_the_batches_do_not_depend_on_the_number_of_workers_nor_on_where_a_run_resumed(digit_shards):
    config = digits().changed(epochs=2, global_batch_size=60, flip=True, color_noise="paper")
    one = take(feed_for(digit_shards, config, 0, 1), 2)
    three = [take(feed_for(digit_shards, config, rank, 3), 2) for rank in range(3)]
    resumed = take(feed_for(digit_shards, config, 0, 1, first_epoch=1), 2, first_epoch=1)
    for key, batches in one.items():
        for step, batch in enumerate(batches):
            parts = [worker[key][step] for worker in three]
            for name, column in batch.items():
                assert np.array_equal(np.concatenate([part[name] for part in parts]), column), (key, step, name)
    for key, batches in resumed.items():
        for ours, theirs in zip(batches, one[key], strict=True):
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    rows = digit_shards[1].rows
    assert [sum(len(b["label"]) for b in one[1, split]) for split in ("train", "val")] == [rows["train"], rows["val"]]
    assert not np.array_equal(one[0, "train"][0]["image"], one[1, "train"][0]["image"])


@pytest.mark.ray
def test_a_short_last_batch_may_leave_a_worker_nothing(digit_shards):
    config = digits().changed(epochs=1, global_batch_size=1436, workers=2)  # 1,437 rows: one is left
    parts = [take(feed_for(digit_shards, config, rank, 2), 1)[0, "train"] for rank in range(2)]
    assert [len(worker[-1]["label"]) for worker in parts] == [0, 1]
    assert parts[0][-1]["image"].shape == (0, 64, 64, 3)


@pytest.mark.ray
def test_images_and_labels_belong_together(digit_shards):
    """Every row of val, decoded here by other means, equals what the feed delivers."""
    import pyarrow.parquet as pq

    from orchestrator import images

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
    feed = Feed(tmp_path, manifest, digits().changed(epochs=1), rank=0, world_size=1, num_cpus=0.25, num_tasks=1)
    feed.start(0)
    with pytest.raises(Exception, match=r"shard-0000\d\.parquet"):
        next(feed.batches("train", 0))


def test_the_reader_needs_no_torch():
    """Ray Data's processes start in a moment because nothing they import is heavy."""
    import subprocess
    import sys

    code = "import sys, orchestrator.feed, alexnet.augment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert TaskReader.__module__ == "orchestrator.feed"
