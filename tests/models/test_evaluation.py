"""Evaluations are those of a plain loop, image by image, whatever the workers and batches."""

import hashlib
import io
import json
import math
import re

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

import alexnet
from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.cli.evaluate import output_of
from orchestrator.data.shard_writer import ShardWriter
from orchestrator.data.shards import Manifest, Shard, schema
from orchestrator.data.sources import open_source
from orchestrator.models import engine, evaluate, label_sets, metrics
from orchestrator.models import evaluation_files as files
from orchestrator.models.engine import Settings
from orchestrator.models.find import FoundModel
from orchestrator.train.worker import why_no_memory

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


def test_tables_of_classes_and_confused_pairs_are_those_of_a_loop(shard_folder, data):
    done = evaluate.evaluate([("one", make_net(1))], data, Settings())
    [result] = done.models
    assert done.ensemble is None
    taken = naive(make_net(1), shard_folder, 1).argmax(1)
    for number, row in enumerate(result.per_class()):
        of_class = [i for i, label in enumerate(data.rows.labels) if label == number]
        assert row["class"] == CLASSES[number]
        assert row["images"] == len(of_class)
        wrong = sum(taken[i] != number for i in of_class)
        assert row["top1_error"] == (pytest.approx(wrong / len(of_class)) if of_class else None)
        assert row["predicted"] == sum(taken == number)
    pairs = {}
    for label, answer in zip(data.rows.labels, taken, strict=True):
        if label != answer:
            pairs[CLASSES[label], CLASSES[answer]] = pairs.get((CLASSES[label], CLASSES[answer]), 0) + 1
    found = {(row["class"], row["taken_for"]): row["images"] for row in result.confused(1000)}
    assert found == pairs
    assert [row["images"] for row in result.confused()] == sorted(pairs.values(), reverse=True)[:20]


def test_classes_in_another_order_are_mapped_by_their_names(shard_folder, data):
    turned = tuple(reversed(CLASSES))
    plain, other = make_net(1), make_net(1, turned)
    with torch.no_grad():
        for part in (other.net.fc8.weight, other.net.fc8.bias):
            part.copy_(part.flip(0).clone())
    other.mean_image[:] = plain.mean_image
    results = [evaluate.evaluate([("x", net)], data, Settings()).models[0] for net in (plain, other)]
    assert results[0].per_class() == results[1].per_class()
    assert results[0].confused() == results[1].confused()
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    with pytest.raises(ValueError, match="MODEL y: has its classes in another order than x"):
        evaluate.evaluate([("x", plain), ("y", other)], data, Settings())


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: make_net(1, (*CLASSES[:6], "z")), "'z' is not one of the data's; 'g' is not one of the model's"),
        (lambda: make_net(1, CLASSES[:5]), "the model has 5 classes and the data 7; 'f' is not one of the model's"),
        (lambda: make_net(1, size=80), "stored at 80 pixels a side, those of .* have 72; prepare them again"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_one_line(data, net, words):
    with pytest.raises(ValueError, match=words):
        evaluate.evaluate([("x", net())], data, Settings())


def test_outputs_that_are_no_class_can_be_answers(data):
    net = make_net(1, num_outputs=9)
    with torch.no_grad():
        net.net.fc8.bias[8] = 1000
    [result] = evaluate.evaluate([("x", net)], data, Settings()).models
    assert result.top1_error == 1
    assert {row["taken_for"] for row in result.confused()} == {"class 8"}


def test_five_classes_have_no_top5_error(data):
    from orchestrator.models.evaluate import _Collected, _result

    part = _Collected()
    part.add(np.log(np.full((2, 5), 0.2)), np.eye(5, dtype=bool)[:2])
    result = _result("x", part, np.array([0, 1]), tuple("abcde"), data, Settings())
    assert (result.top1_error, result.top5_error, result.as_json()["top5_interval"]) == (1, None, None)


def test_labels_by_name_and_by_number_and_images_without_any(data, shard_folder, tmp_path):
    """Right is any of an image's labels; images with an empty list are not counted."""
    by_name = {name: [CLASSES[i % 7], (i + 2) % 7] for i, name in enumerate(data.rows.names)}
    for name in data.rows.names[:4]:
        by_name[name] = []
    (tmp_path / "names.json").write_text(json.dumps(by_name))
    valid = label_sets.read_label_sets(str(tmp_path / "names.json"), data.rows, CLASSES)
    done = evaluate.evaluate([("x", make_net(1))], data, Settings(), valid=valid)
    taken = naive(make_net(1), shard_folder, 1).argmax(1)
    wrong = [taken[i] not in (i % 7, (i + 2) % 7) for i in range(4, NUM)]
    assert done.left_out == 4
    assert len(done.models[0].wrong) == NUM - 4
    assert done.models[0].top1_error == pytest.approx(np.mean(wrong))
    ordered = [by_name[name] for name in sorted(by_name, key=lambda name: name.rsplit("/")[-1])]
    (tmp_path / "list.json").write_text(json.dumps(ordered))
    np.testing.assert_array_equal(label_sets.read_label_sets(str(tmp_path / "list.json"), data.rows, CLASSES), valid)


def test_lists_for_imagenet_are_by_the_number_in_the_name(tmp_path):
    from orchestrator.models.shard_rows import Rows

    names = [f"val/n{i}/ILSVRC2012_val_{number:08d}.JPEG" for i, number in enumerate((3, 1, 4))]
    rows = Rows(np.arange(3), np.zeros(3, np.int64), names)
    (tmp_path / "real.json").write_text("[[1], [], [0], [2, 1]]")
    valid = label_sets.read_label_sets(str(tmp_path / "real.json"), rows, ("a", "b", "c"))
    assert valid.tolist() == [[True, False, False], [False, True, False], [False, True, True]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[1]]", "has 1 entries for 37 images"),
        ('{"a.jpg": [1]}', "has no labels of 'val/0/000.jpg'; give an empty list"),
        ("7", "expected a list of lists of labels"),
        ("{", "is not JSON"),
        (json.dumps([[7]] * 37), "has the label 7; expected a class's name, such as 'a', or its number, below 7"),
        (json.dumps([["q"]] * 37), "has the label 'q'"),
        (json.dumps([True] * 37), "has True; expected a list of labels"),
        (json.dumps([[]] * 37), "has no label for any image"),
    ],
)
def test_wrong_labels_are_one_line(data, tmp_path, text, words):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        label_sets.read_label_sets(str(tmp_path / "labels.json"), data.rows, CLASSES)
    assert "\n" not in str(error.value)


@pytest.mark.ray
@pytest.mark.slow
def test_every_row_once_whatever_the_workers(ray_here, shard_folder, data):
    """Actors give what this process does, to the last bit of what is counted."""
    nets = [("x", make_net(1)), ("y", make_net(2))]
    alone = evaluate.evaluate(nets, data, Settings(batch_size=8))
    for workers in (1, 2, 3):
        done = evaluate.evaluate(nets, data, Settings(batch_size=8), num_workers=workers)
        for ours, theirs in zip(alone.results, done.results, strict=True):
            np.testing.assert_array_equal(ours.predicted, theirs.predicted)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line_with_the_flag_that_helps(data, error):
    net = make_net(1)

    def fail(stored, views):
        raise error

    net.log_probabilities = fail
    with pytest.raises(JobError, match=r"^not enough memory \(.*\); a smaller --batch-size may do$"):
        evaluate.evaluate([("one", net)], data, Settings())
    assert re.match(r"^not enough memory \(.*\); a --global-batch-size below 128, ", why_no_memory(error, 128))


def test_another_runtime_error_is_a_defect_and_no_want_of_memory(data):
    net = make_net(1)
    net.log_probabilities = lambda stored, views: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        evaluate.evaluate([("one", net)], data, Settings())


def digits_in_parts(net):
    """The bundled digits of the training and of the validation part, as they are stored, and their labels."""
    parts = []
    for split in ("train", "val"):
        entries = open_source("digits").splits[split][:: 2 if split == "train" else 1]
        pixels = np.stack([net.stored(entry.data) for entry in entries])
        parts.append((pixels, np.array([entry.label for entry in entries])))
    return parts


def test_bf16_makes_the_errors_of_fp32_within_rounding_on_the_digits():
    """A net whose last layer is fitted to them."""
    net = make_net(1, tuple("0123456789"), num_outputs=10)
    (train, train_labels), (val, labels) = digits_in_parts(net)
    features = []
    hook = net.net.fc8.register_forward_hook(lambda layer, given, output: features.append(given[0].double()))
    for first in range(0, len(train), 128):
        net.probabilities(train[first : first + 128])
    hook.remove()
    inputs, wanted = torch.cat(features), torch.nn.functional.one_hot(torch.from_numpy(train_labels), 10).double()
    ridge = inputs.T @ inputs + 1e-3 * inputs.square().sum(0).mean() * torch.eye(inputs.shape[1], dtype=torch.float64)
    with torch.no_grad():
        net.net.fc8.weight.copy_(8 * torch.linalg.solve(ridge, inputs.T @ wanted).T)
        net.net.fc8.bias.zero_()
    found = {}
    for precision in ("fp32", "bf16"):
        worker = engine.Worker([net], None, Settings(precision=precision, device="cpu"), 2)
        found[precision] = worker._compute(val)[0]
        worker.close()
    wrong = {name: metrics.num_not_worse(each, np.eye(10, dtype=bool)[labels]) >= 1 for name, each in found.items()}
    assert 0 < wrong["fp32"].mean() < 0.3
    assert wrong["bf16"].mean() == pytest.approx(wrong["fp32"].mean(), abs=0.03), "only images near the border differ"
    loss = {name: -each[np.arange(len(labels)), labels].mean() for name, each in found.items()}
    assert loss["bf16"] == pytest.approx(loss["fp32"], rel=0.02)
    apart = np.abs(found["bf16"] - found["fp32"]).mean() / np.abs(found["fp32"]).mean()
    assert 2**-16 < apart < 16 * 2**-8, "other arithmetic, and no more than its rounding"


def test_what_sets_evaluations_apart_is_in_their_names(shard_folder, data, tmp_path):
    own = data.manifest.digest
    assert files.variant(Settings(), data, own, None) == ()
    (tmp_path / "re al.json").write_bytes(b"[]")
    train = evaluate.open_data(str(shard_folder), "train")
    labels = hashlib.sha256(b"[]").hexdigest()[:8]
    what = files.variant(Settings(10, "bf16"), train, "another", str(tmp_path / "re al.json"))
    assert what == ("train", "10crop", "bf16", f"data-{own[:8]}", f"labels-re-al-{labels}")
    result = evaluate.evaluate([("one", make_net(1))], data, Settings()).models[0]
    assert set(files.metric_names(result, ())) == {
        "eval/loss", "eval/top1_error", "eval/top5_error", "eval/ece",
    }  # fmt: skip
    assert files.metric_names(result, ("train", "10crop"))["eval/train_top1_error_10crop"] == result.top1_error
    assert f"eval/loss_labels-re-al-{labels}" in files.metric_names(result, what[-1:])


@pytest.mark.parametrize(
    ("names", "what", "folder"),
    [
        (["mine"], (), ""),
        (["mine"], ("10crop",), "/evaluation-10crop"),
        (["mine-checkpoint-epoch-0002"], (), "/evaluation-checkpoint-epoch-0002"),
        (["mine", "other"], ("train", "10crop"), "/evaluation-with-other-train-10crop"),
    ],
)
def test_only_the_plain_evaluation_is_in_the_run_s_folder_itself(tmp_path, names, what, folder):
    run = StoragePath.of(tmp_path / "runs" / "mine")
    found = [FoundModel(name, name, tmp_path, run) for name in names]
    assert str(output_of(found, None, what)) == f"{run}{folder}"
    assert str(output_of(found, str(tmp_path / "x"), what)) == str(tmp_path / "x")
