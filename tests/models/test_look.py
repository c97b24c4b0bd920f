"""A look into a net, from a run's folder to the page and its run in MLflow; without Ray."""

import dataclasses
import hashlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import ROOT, refused
from pages import Tags, assert_self_contained

import alexnet
from alexnet.explain import features_and_probabilities
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.data.shard_writer import ShardWriter
from orchestrator.data.shards import Manifest
from orchestrator.data.sources import open_source
from orchestrator.models import film
from orchestrator.models.evidence import nearest, see, validate
from orchestrator.models.find import find_model
from orchestrator.models.look import Look
from orchestrator.models.planes import planes
from orchestrator.models.stored import Part
from orchestrator.train.run_folder import RunFolder

CLASSES = ("<img src=x onerror=alert(1)>", "$\\frac{", "a\u202eb", "数字", *"456789")  # of strangers
SIDE = 72


def make_shards(folder, train=300, val=70):
    """Some of the digits, several row groups of raw pixels, under hostile names."""
    source, place = open_source("digits"), StoragePath.of(folder)
    writer = ShardWriter(place, SIDE, None, 10, row_group_rows=128)
    reports = {}
    for split, count in (("train", train), ("val", val)):
        entries = [entry.__class__(entry.id, entry.label, f"{split}/<script>{entry.id}", data=entry.data)
                   for entry in source.splits[split][:count]]  # fmt: skip
        reports[split] = json.loads(writer.make(split, f"{split}/shard-00000.parquet", entries)["report"])
    np.save(folder / "mean_image.npy", np.full((SIDE, SIDE, 3), 80, np.float32))
    eye = tuple(map(tuple, np.eye(3)))
    manifest = Manifest(
        source="digits", classes=CLASSES, image_size=SIDE, encoding="raw", jpeg_quality=None, seed=0,
        rows={"train": train, "val": val}, class_rows={name: each["class_rows"] for name, each in reports.items()},
        rejected=0, mean_rgb=(80, 80, 80), covariance_rgb=((0, 0, 0),) * 3, eigenvalues=(0, 0, 0), eigenvectors=eye,
        mean_image_sha256=hashlib.sha256((folder / "mean_image.npy").read_bytes()).hexdigest(),
        shards=tuple(each["shard"] for each in reports.values()),
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.sealed().model_dump_json())
    return place, manifest


def net_of(manifest, seed, classes=CLASSES):
    net = alexnet.build("paper", len(classes), width=0.0625, input_size=64, init="he", seed=seed)
    build = {"preset": "paper", "num_classes": len(classes), "width": 0.0625, "input_size": 64, "lrn": {}}
    described = alexnet.Description(build, classes, 1 / 64, epoch=seed, data="digits", digest=manifest.digest)
    return alexnet.TrainedNet(net, described, np.full((SIDE, SIDE, 3), 80, np.float32))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def run(tmp_path, monkeypatch, data):
    """A run of three epochs, of which the weights of each are kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = RunFolder(tmp_path / "runs", "mine")
    folder.create(digits().changed(data=str(data[0])))
    for name, seed in (("kept-epoch-0001", 1), ("kept-epoch-0002", 2), ("checkpoint-epoch-0002", 2),
                       ("checkpoint-epoch-0003", 3)):  # fmt: skip
        net_of(data[1], seed).save(folder.path.local / name)
    folder.write_result({"best_checkpoint": "checkpoint-epoch-0003"})
    return folder


def look(monkeypatch, capsys, *args):
    """The lines that the job prints; run in this process, which has its imports already."""
    monkeypatch.setattr(sys, "argv", ["look.py", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / "look.py"), run_name="__main__")
    done = capsys.readouterr()
    assert ended.value.code == 0, done.err
    return done.out.splitlines()


def everything(part):
    images, labels = zip(*part.batches(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_what_a_pass_finds_is_what_all_images_at_once_give(compiled, data):
    model, (train, val) = net_of(data[1], 3), (Part(data[0], split) for split in ("train", "val"))
    images, labels = everything(val)
    assert len(images) == val.rows == 70
    features, probabilities = features_and_probabilities(model, images)
    found = validate(model, val, lambda what, done, total: None)
    answers = probabilities.argmax(1)
    wrong = np.flatnonzero(answers != labels)
    assert (found.images, found.wrong) == (70, len(wrong))
    surest = sorted(wrong, key=lambda i: -probabilities[i].max())[:12]
    assert [each.label for each in found.mistakes] == labels[surest].tolist()
    assert [each.answer for each in found.mistakes] == answers[surest].tolist()
    assert [each.image.tobytes() for each in found.mistakes] == [images[i].tobytes() for i in surest]
    shown = [i * 70 // 8 for i in range(8)]
    assert [each.image.tobytes() for each in found.shown] == [images[i].tobytes() for i in shown]
    ids = [entry.id for entry in open_source("digits").splits["val"][:70]]
    assert [each.name for each in found.shown] == [f"val/<script>{ids[i]}" for i in shown]
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == labels.tolist()

    images, labels = everything(train)
    features = features_and_probabilities(model, images)[0].astype(np.float64)
    near = nearest(model, train, found.shown, lambda what, done, total: None)
    for query, each in zip(found.shown, near, strict=True):
        distances = np.sqrt(np.square(features - query.features).sum(1))
        order = np.argsort(distances, kind="stable")[:6]
        assert [stored.image.tobytes() for stored, _ in each] == [images[i].tobytes() for i in order]
        assert [stored.label for stored, _ in each] == labels[order].tolist()
        assert [distance for _, distance in each] == pytest.approx(distances[order].tolist(), rel=1e-3)


def test_of_a_large_part_row_groups_evenly_apart_are_taken(data):
    part = Part(data[0], "train", at_most=130)
    assert (part.rows, part.total) == (128, 300)
    whole, some = everything(Part(data[0], "train"))[0], everything(part)[0]
    assert some.tobytes() == whole[:128].tobytes()
    last = Part(data[0], "train")
    assert last.at(299).image.tobytes() == whole[299].tobytes()
    assert last.at(128).name == f"train/<script>{open_source('digits').splits['train'][128].id}"


def test_an_image_of_the_user_is_the_nearest_to_itself(compiled, data):
    model, train = net_of(data[1], 3), Part(data[0], "train")
    stored = train.at(200)
    (found,) = nearest(model, train, see(model, [(stored.image, "mine")]), lambda what, done, total: None)
    assert (found[0][0].name, found[0][1]) == (stored.name, pytest.approx(0, abs=1e-3))
    assert [distance for _, distance in found] == sorted(distance for _, distance in found)


def test_planes_are_the_same_whenever_they_are_drawn():
    random = np.random.default_rng(0)
    features = np.concatenate([random.normal(size=(20, 30)), random.normal(size=(20, 30)) + 20]).astype(np.float32)
    first, again = planes(features), planes(features)
    assert list(first)[1] == "t-SNE"
    for name, points in first.items():
        assert points.shape == (40, 2)
        assert points.tobytes() == again[name].tobytes()
        apart = np.linalg.norm(points[:20].mean(0) - points[20:].mean(0))
        assert apart > 2 * np.linalg.norm(points[:20] - points[:20].mean(0), axis=1).mean(), "two groups stay two"
    assert len(planes(features[:4])) == 1, "too few for t-SNE"
    assert len(planes(np.zeros((12, 3), np.float32))) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow and its own dependencies warn about each other
def test_a_look_from_a_run_to_the_page_and_to_mlflow(compiled, run, tmp_path, monkeypatch, capsys, data):
    from orchestrator.tracking.artifacts import add_files
    from orchestrator.tracking.store import Store
    from orchestrator.tracking.training_run import Tracker

    uri = f"sqlite:///{tmp_path / 'tracked.db'}"
    tracker = Tracker(uri)
    tracker.run.begin("mine", "jobs/train.py", {})
    tracker.finish("FINISHED", hurry=False)
    client, run_id = Store(uri).client, tracker.run.run_id
    before = client.get_run(run_id).info
    run.write_result({"best_checkpoint": "checkpoint-epoch-0003", "mlflow_run_id": run_id, "mlflow_tracking_uri": uri})
    photograph = tmp_path / "'><script>.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(photograph)

    said = look(monkeypatch, capsys, "mine", "--film", "--image", photograph)
    folder = run.path.local / "look"
    pictures = ["fc7.png", "film.png", "grad_cam.png", "kernels.png", "maps.png", "mistakes.png", "neighbours.png",
                "predictions.png"]  # fmt: skip
    assert sorted(file.name for file in folder.iterdir()) == [*pictures[:4], "look.html", *pictures[4:]]
    assert said[-3:] == [f"8 pictures in {folder}", f"page      {folder / 'look.html'}",
                    f"MLflow    run {run_id}, artifacts look/"]  # fmt: skip
    text = (folder / "look.html").read_text()
    assert_self_contained(text)
    assert [tag for tag, _ in Tags(text).tags].count("img") == len(pictures)
    assert any("'><script>.png" in each for each in Tags(text).texts)
    assert any("<img src=x onerror=alert(1)>" in each for each in Tags(text).texts)
    for name in pictures:
        with PIL.Image.open(folder / name) as image:
            assert min(image.size) > 150, name
            assert getattr(image, "n_frames", 1) == (3 if name == "film.png" else 1)

    after = client.get_run(run_id).info
    assert (after.status, after.start_time, after.end_time) == (before.status, before.start_time, before.end_time)
    stored = {item.path: item.file_size for item in client.list_artifacts(run_id, "look")}
    assert stored == {f"look/{file.name}": file.stat().st_size for file in folder.iterdir()}
    assert add_files(uri, "0" * 32, "look", {"a": b""}) == f"MLflow at {uri} has no run {'0' * 32}"


@pytest.mark.filterwarnings("ignore")  # MLflow and its own dependencies warn about each other
@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), torch.OutOfMemoryError("no room"), RuntimeError("x: can't allocate memory: no room")],
)
def test_too_little_memory_is_one_line_with_what_takes_less(run, tmp_path, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(Look, "images", fail)
    monkeypatch.setattr(sys, "argv", ["look.py", "mine", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / "look.py"), run_name="__main__")
    line = capsys.readouterr().err
    assert ended.value.code == 1
    assert re.fullmatch(
        r"error: not enough memory \(.*no room\); fewer --image, or a machine with more memory, may do\n", line
    )


def test_without_data_only_what_needs_none_and_a_line_about_it(run, tmp_path, monkeypatch, capsys, data):
    """A run whose data and whose store are gone, and a copied checkpoint, which has neither."""
    run.change(digits().changed(data=str(tmp_path / "gone")))
    run.write_result({"best_checkpoint": "checkpoint-epoch-0003", "mlflow_run_id": "abc"})
    said = look(monkeypatch, capsys, "mine")
    less = "no images but those of --image are looked at; give the data with --data"
    assert said[0] == f"its data, {tmp_path / 'gone'}, is not there: {less}"
    assert said[-1] == f"warning: MLflow at sqlite:///{tmp_path / 'mlflow.db'} is not there"
    assert not (tmp_path / "mlflow.db").exists(), "a look makes no store"
    assert sorted(file.name for file in (run.path.local / "look").iterdir()) == ["kernels.png", "look.html"]

    net_of(data[1], 5).save(tmp_path / "copy")
    PIL.Image.new("RGB", (80, 90), "red").save(tmp_path / "red.png")
    said = look(monkeypatch, capsys, "copy", "--image", "red.png", "--output", "pictures")
    assert said == [f"it is not known what it was trained on: {less}", f"4 pictures in {tmp_path / 'pictures'}",
                    f"page      {tmp_path / 'pictures' / 'look.html'}"]  # fmt: skip
    found = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert found == ["grad_cam.png", "kernels.png", "look.html", "maps.png", "predictions.png"]


def test_a_film_of_a_run_and_of_a_search_s_best_trial_in_object_storage(run, s3, tmp_path):
    root, local = s3[0], run.path.local
    for file in filter(Path.is_file, local.rglob("*")):
        for place in (root / "mine", root / "tuned" / "trials" / "0003"):
            (place / str(file.relative_to(local))).write(file.read_bytes())
    (root / "tuned" / "search.yaml").write(b"")
    result = {"best": 3, "trials": [{"number": 3, "best": {"epoch": 3}}]}
    (root / "tuned" / "result.json").write(json.dumps(result).encode())
    expected = film.kernels_by_epoch(run.path)
    for name in ("mine", "tuned"):
        found = find_model((root / name).text, tmp_path / name)
        kernels = film.kernels_by_epoch(film.folder_of(found))
        assert list(kernels) == list(expected) == ["epoch 1", "epoch 2", "epoch 3"]
        for epoch, each in kernels.items():
            np.testing.assert_array_equal(each, expected[epoch])


def test_a_tie_is_wrong_in_a_look_as_it_is_in_an_evaluation(compiled, data):
    """A net that answers the same for all classes is right about no image, not about those of the first class."""
    model, val = net_of(data[1], 3), Part(data[0], "val")
    torch.nn.init.zeros_(model.net.fc8.weight)
    torch.nn.init.zeros_(model.net.fc8.bias)
    found = validate(model, val, lambda what, done, total: None)
    assert (found.images, found.wrong) == (70, 70)
    assert all(each.answer != each.label for each in [*found.shown, *found.mistakes])
    assert found.shown[0].best(3) == [0, 1, 2]


def test_classes_of_one_name_are_told_apart():
    model = net_of(SimpleNamespace(digest="d"), 1, ("n1", "n2", "n3"))
    described = dataclasses.replace(model.description, class_names=("crane, machine", "dog, hound", "crane, bird"))
    named = alexnet.TrainedNet(model.net, described, model.mean_image)
    assert Look(named, "net").names == ["crane (n1)", "dog", "crane (n3)"]


def test_a_film_has_a_frame_for_each_epoch_on_one_scale(run):
    kernels = film.kernels_by_epoch(run.path)
    assert list(kernels) == ["epoch 1", "epoch 2", "epoch 3"]
    kernels["epoch 1"] = kernels["epoch 2"] / 4
    kernels["epoch 3"] = kernels["epoch 2"]
    data = film.film(kernels, 2, "t")
    assert data == film.film(kernels, 2, "t")
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        frames = []
        for number in range(3):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
    ink = [np.abs(frame - 128)[150:-60][frame[150:-60].max(-1) < 255].mean() for frame in frames]
    assert ink[0] < ink[1] / 2, "weights a quarter as large are fainter"
    assert ink[1] == pytest.approx(ink[2], rel=0.05)


WRONG = [
    (["mine", "--data", "nowhere"], r"look.py: error: --data .*nowhere: no such folder; make one with: python jobs"),
    (["mine", "--image", "none.jpg"], r"look.py: error: --image none.jpg: cannot be read \(No such file"),
    (["mine", "--image", "x" * 5000], r"look.py: error: --image x{600,} \.\.\. \(\d+ more characters\) \.\.\. "
     r"x{200,}: cannot be read \(File name too long\)$"),
    (["mine", "--image", "text.jpg"], r"look.py: error: --image text.jpg: not an image in a format that is read"),
    (["mine", "--max-images", "0"], r"look.py: error: argument --max-images: 0: must be at least 1"),
    (["copy", "--output", "text.jpg"], r"look.py: error: --output .*text.jpg: cannot be written \(.*\); choose"),
    (["yours"], r"look.py: error: MODEL 'yours': is not there"),
    (["other"], r"look.py: error: --data .*: has the class '数字' where the net has '3'; give the data that it was"),
    (["copy", "--film"], r"look.py: error: --film: takes a run, and this model is not in the folder of one"),
    (["once", "--film"], r"look.py: error: --film: takes the weights of two epochs or more, and .*once has kept only "
     "epoch 3$"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_what_cannot_be_looked_at_is_one_line(run, tmp_path, monkeypatch, capsys, data, args, message):
    (tmp_path / "text.jpg").write_text("hello")
    net_of(data[1], 5).save(tmp_path / "copy")
    for name, classes in (("once", CLASSES), ("other", (*CLASSES[:3], "3", *CLASSES[4:]))):
        folder = RunFolder(tmp_path / "runs", name)
        folder.create(digits().changed(data=str(data[0])))
        net_of(data[1], 3, classes).save(folder.path.local / "checkpoint-epoch-0003")
    line = refused("look", args, tmp_path, monkeypatch, capsys)
    assert re.search(message, line), line
    assert not list(tmp_path.glob("**/look*")), "nothing was written"
