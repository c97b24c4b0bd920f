"""Evaluations are those of a plain loop, image by image, whatever the workers and batches."""

import io
import math

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

import alexnet
from orchestrator.base.storage import StoragePath
from orchestrator.data.shard_writer import ShardWriter
from orchestrator.data.shards import Manifest, Shard, schema
from orchestrator.models import engine, evaluate
from orchestrator.models.engine import Settings

CLASSES = tuple("abcdefg")
SIZE, NUM = 72, 37
BUILD = {"preset": "paper", "num_classes": 7, "width": 0.0625, "input_size": 64, "lrn": {}}


def make_net(seed, classes=CLASSES, size=SIZE, num_outputs=7):
    net = alexnet.build("paper", num_outputs, width=0.0625, input_size=64, init="he", seed=seed)
    with torch.no_grad():
        net.fc8.weight.mul_(3)  # so that its answers differ
    description = alexnet.Description(BUILD | {"num_classes": num_outputs}, classes, pixel_scale=1 / 64, epoch=seed)
    mean = np.random.default_rng(seed).uniform(0, 255, (size, size, 3)).astype(np.float32)
    return alexnet.TrainedNet(net, description, mean)


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory):
    """Validation shards of 37 noisy pictures, in two files of row groups of 8."""
    folder = StoragePath.of(tmp_path_factory.mktemp("evaluate") / "shards")
    random = np.random.default_rng(0)
    files = []
    for _ in range(NUM):
        out = io.BytesIO()
        small = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        PIL.Image.fromarray(small).resize((SIZE, SIZE)).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    writer = ShardWriter(folder, SIZE, 90, len(CLASSES), row_group_rows=8)
    labels = random.integers(0, len(CLASSES), NUM).astype(np.int32)
    ids = random.permutation(1000)[:NUM]
    shards = []
    for split, first, last in (("train", 0, 5), ("val", 0, 21), ("val", 21, NUM)):
        file = f"{split}/shard-{first:05d}.parquet"
        columns = {
            "image": files[first:last], "label": labels[first:last], "id": ids[first:last].tolist(),
            "name": [f"{split}/{i % 3}/{i:03d}.jpg" for i in range(first, last)],
        }  # fmt: skip
        assert list(columns) == schema("jpeg", SIZE).names
        written = writer.write(folder / file, columns)
        shards.append(Shard(file=file, split=split, rows=last - first, **written))
    rows = {"train": 5, "val": NUM}
    counts = {s: tuple(np.bincount(labels[:n], minlength=7).tolist()) for s, n in rows.items()}
    manifest = Manifest(
        source="made", classes=CLASSES, image_size=SIZE, jpeg_quality=90, seed=0, rows=rows, class_rows=counts,
        rejected=0, mean_rgb=(1, 1, 1), covariance_rgb=((1, 0, 0), (0, 1, 0), (0, 0, 1)), eigenvalues=(1, 1, 1),
        eigenvectors=((1, 0, 0), (0, 1, 0), (0, 0, 1)), mean_image_sha256="0" * 64, shards=tuple(shards),
    ).sealed()  # fmt: skip
    (folder / "manifest.json").write(manifest.model_dump_json().encode())
    return folder


@pytest.fixture(scope="module")
def data(shard_folder):
    return evaluate.open_data(str(shard_folder))


def naive(trained, folder, views):
    """(N, K) probabilities: PIL, slices and float64, an image at a time."""
    found = []
    net, mean = trained.net.double(), trained.mean_image.astype(np.float64)
    margin = SIZE - 64
    places = [(margin // 2, margin // 2)]
    if views == 10:
        places += [(0, 0), (0, margin), (margin, 0), (margin, margin)]
    for file in sorted((folder.local / "val").iterdir()):
        for data in pq.read_table(file)["image"].to_pylist():
            x = (np.asarray(PIL.Image.open(io.BytesIO(data))) - mean) / 64
            crops = [x[top : top + 64, left : left + 64] for top, left in places]
            crops += [crop[:, ::-1] for crop in crops] if views == 10 else []
            with torch.no_grad():
                scores = net(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))
            found.append(torch.softmax(scores, 1).mean(0).numpy())
    net.float()
    return np.stack(found)


def expect(result, probabilities, labels):
    """Errors and loss by loops over images."""
    wrong1 = wrong5 = loss = 0
    for p, label in zip(probabilities, labels, strict=True):
        better = sum(other >= p[label] for i, other in enumerate(p) if i != label)
        wrong1, wrong5, loss = wrong1 + (better >= 1), wrong5 + (better >= 5), loss - math.log(p[label])
    num = len(labels)
    assert (result.top1_error, result.top5_error) == (wrong1 / num, wrong5 / num)
    assert result.loss == pytest.approx(loss / num, rel=1e-4)


@pytest.mark.parametrize("views", [1, 10])
def test_errors_of_two_models_and_their_ensemble_are_those_of_a_plain_loop(shard_folder, data, views):
    nets = [make_net(1), make_net(2)]
    kept = []
    done = evaluate.evaluate(
        [("one", nets[0]), ("two", nets[1])], data, Settings(views, batch_size=8),
        keep=lambda rows, *top: kept.append((rows, *top)),
    )  # fmt: skip
    parts = [naive(net, shard_folder, views) for net in nets]
    for result, probabilities in zip(done.results, [*parts, (parts[0] + parts[1]) / 2], strict=True):
        expect(result, probabilities, data.rows.labels)
    both = (parts[0] + parts[1]) / 2
    rows, classes, shown = (np.concatenate(part) for part in zip(*kept, strict=True))
    np.testing.assert_array_equal(rows, np.arange(NUM))
    np.testing.assert_array_equal(classes, np.argsort(-both, 1)[:, :5])
    np.testing.assert_allclose(shown, -np.sort(-both, 1)[:, :5], rtol=1e-4)
    [first, *_] = done.comparisons
    assert first[:2] == ("one", "two")
    wrong = [(p.argmax(1) != data.rows.labels) for p in parts]
    assert first[2].only_first_wrong == (wrong[0] & ~wrong[1]).sum()


def test_every_row_once_whatever_the_batches(shard_folder, data):
    net = make_net(1)
    reader = evaluate.ShardReader(data.folder, data.manifest, "val")
    with engine.start([net], reader, Settings(batch_size=10)) as here:
        answers = list(here.answers(evaluate.ranges(NUM, 10)))
    assert [len(answer.ids) for answer in answers] == [10, 10, 10, 7]
    np.testing.assert_array_equal(np.concatenate([answer.ids for answer in answers]), data.rows.ids)
    found = np.concatenate([answer.log_probabilities[0] for answer in answers])
    np.testing.assert_allclose(np.exp(found), naive(net, shard_folder, 1), rtol=1e-3, atol=1e-6)
