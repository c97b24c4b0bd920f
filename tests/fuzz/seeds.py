"""Sound files of every format that is fuzzed, made by code: small, so that a changed byte often matters."""

import functools
import gzip
import io
import json
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io
import yaml

import alexnet
import alexnet.weights
from orchestrator.config.recipes import digits
from orchestrator.data.shards import Manifest, Shard

CLASSES = ("cat", "dog")
WNIDS = ("n01440764", "n02102040")


def image(number: int = 0, form: str = "JPEG", mode: str = "RGB", side: int = 24, **options: object) -> bytes:
    """A picture of its own for every number."""
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(small).resize((side, side + number % 5)).convert(mode)
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    found = PIL.Image.Exif()
    found[274] = orientation
    return found.tobytes()


def jpeg() -> list[bytes]:
    return [image(1), image(2, mode="L"), image(3, mode="CMYK"), image(4, exif=exif(6), quality=95, subsampling=0)]


def progressive_jpeg() -> list[bytes]:
    return [image(1, progressive=True), image(2, mode="L", progressive=True), image(3, progressive=True, side=80)]


def png() -> list[bytes]:
    deep = io.BytesIO()
    PIL.Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(deep, "PNG")
    modes = [image(n, "PNG", mode) for n, mode in enumerate(("RGB", "RGBA", "P", "L", "1", "LA"))]
    frames = [PIL.Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "PNG", save_all=True, append_images=frames[1:])
    return [*modes, deep.getvalue(), image(7, "PNG", exif=exif(3)), animated.getvalue()]


def tiff() -> list[bytes]:
    packings = [
        image(n, "TIFF", compression=c) for n, c in enumerate(("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"))
    ]
    real = io.BytesIO()
    PIL.Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)).save(real, "TIFF")
    return [*packings, real.getvalue(), image(5, "TIFF", "CMYK"), image(6, "TIFF", "1", compression="group4")]


def webp() -> list[bytes]:
    frames = [PIL.Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    return [
        image(1, "WEBP"),
        image(2, "WEBP", "RGBA", lossless=True),
        image(3, "WEBP", exif=exif(8)),
        animated.getvalue(),
    ]


def gif() -> list[bytes]:
    frames = [PIL.Image.new("P", (20, 20), n) for n in range(3)]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:], transparency=0)
    return [image(1, "GIF", "P"), image(2, "GIF", "L"), animated.getvalue()]


def other_images() -> list[bytes]:
    found = [image(1, form) for form in ("BMP", "PPM", "TGA", "PCX", "SGI", "ICO", "JPEG2000", "DIB")]
    found += [image(2, "PPM", "1"), image(3, "PPM", "L"), image(4, "JPEG2000", "RGBA"), image(5, "TGA", "RGBA")]
    return [*found, image(6, "AVIF")] if "AVIF" in PIL.Image.SAVE else found


def files() -> dict[str, bytes]:
    """Images in folders of classes."""
    found = {}
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(CLASSES):
            found |= {f"{part}/{name}/{i}.jpg": image(10 * label + i + 100 * (part == "val")) for i in range(count)}
    return found


def samples() -> dict[str, bytes]:
    """WebDataset's."""
    found = {}
    for i in range(6):
        found |= {f"{i:04d}.jpg": image(i), f"{i:04d}.cls": str(i % 2).encode()}
    return found | {"0006.jpg": image(9), "0006.json": json.dumps({"label": 1}).encode()}


def tar_of(contents: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar() -> list[bytes]:
    long = {("train/" + name + "/" + "x" * 120 + f"{i}.jpg"): image(i) for i in range(3) for name in CLASSES}
    return [
        tar_of(files()), tar_of(long, tarfile.GNU_FORMAT), tar_of(long, tarfile.PAX_FORMAT),
        tar_of({name.replace("cat", "kätzchen"): data for name, data in files().items()}, tarfile.PAX_FORMAT),
    ]  # fmt: skip


def webdataset() -> list[bytes]:
    return [tar_of(samples()), tar_of(samples(), tarfile.PAX_FORMAT)]


def zip_of(contents: dict[str, bytes], packing: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return out.getvalue()


def zip_archive() -> list[bytes]:
    return [zip_of(files(), zipfile.ZIP_STORED), zip_of(files(), zipfile.ZIP_DEFLATED)]


def meta_mat() -> list[bytes]:
    rows = [(n, wnid, f"name of {wnid}", "gloss", 0) for n, wnid in enumerate(WNIDS, 1)] + [(3, "n1", "group", "", 2)]
    kinds = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    found = []
    for packed in (False, True):
        out = io.BytesIO()
        content = {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)}
        scipy.io.savemat(out, content, do_compression=packed)
        found.append(out.getvalue())
    return found


def devkit() -> list[bytes]:
    base = "ILSVRC2012_devkit_t12/data/"
    truth = base + "ILSVRC2012_validation_ground_truth.txt"
    return [gzip.compress(tar_of({base + "meta.mat": meta_mat()[0], truth: b"1\n2\n1\n"}), 1, mtime=0)]


def batch(count: int = 3, number: int = 0) -> bytes:
    random = np.random.default_rng(number)
    labels = [int(n) for n in random.integers(0, 10, count)]
    names = [b"f%d.png" % i for i in range(count)]
    data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": data, b"labels": labels, b"filenames": names}, protocol=2)


def cifar_meta() -> bytes:
    return pickle.dumps({b"label_names": [b"class%d" % i for i in range(10)]}, protocol=2)


def cifar_pickle() -> list[bytes]:
    return [batch(), batch(1, 1), cifar_meta()]


def table(count: int = 12) -> pa.Table:
    images = [{"bytes": image(i), "path": f"{i}.jpg"} for i in range(count)]
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    made = pa.table({"image": images, "label": [i % 2 for i in range(count)]})
    return made.replace_schema_metadata(metadata)


def words_table() -> pa.Table:
    labels = pa.array([CLASSES[i % 2] for i in range(12)]).dictionary_encode()
    return pa.table({"img": [image(i) for i in range(12)], "class": labels, "name": [f"{i}.jpg" for i in range(12)]})


def parquet() -> list[bytes]:
    found = []
    for made, packing in ((table(), "none"), (table(), "snappy"), (words_table(), "zstd"), (words_table(), "none")):
        out = io.BytesIO()
        pq.write_table(made, out, compression=packing, row_group_size=5)
        found.append(out.getvalue())
    return found


def arrow() -> list[bytes]:
    found = []
    for made in (table(), words_table()):
        for form in (pa.ipc.new_stream, pa.ipc.new_file):
            out = io.BytesIO()
            with form(out, made.schema) as writer:
                writer.write_table(made, max_chunksize=6)
            found.append(out.getvalue())
    return found


def csv_table() -> list[bytes]:
    rows = [(f"{i}.jpg", CLASSES[i % 2], ("train", "val")[i > 5]) for i in range(8)]
    plain = "filename,label,split\n" + "".join(",".join(row) + "\n" for row in rows)
    quoted = "id\tspecies\n" + "".join(f'"{row[0]}"\t"{row[1]}"\n' for row in rows)
    return [plain.encode(), quoted.encode(), plain.replace(",", ";").encode("utf-8-sig")]


def jsonl() -> list[bytes]:
    rows = [{"file_name": f"{i}.jpg", "label": CLASSES[i % 2], "n": i} for i in range(8)]
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


def caffe() -> list[bytes]:
    return ["".join(f"{i}.jpg {i % 2}\n" for i in range(6)).encode()]


def manifest() -> list[bytes]:
    """As text without its checksum, which the fuzzer adds."""
    found = []
    for encoding in ("jpeg", "raw"):
        shards = [
            Shard(file=f"{split}/shard-00000.parquet", split=split, rows=rows, row_groups=(rows,), size_bytes=10**6,
                  sha256="0" * 64, pixels_at=(4,) if encoding == "raw" else ())
            for split, rows in (("train", 6), ("val", 2))
        ]  # fmt: skip
        made = Manifest(
            source="x", classes=CLASSES, image_size=72, encoding=encoding, seed=0, rejected=0,
            jpeg_quality=90 if encoding == "jpeg" else None, rows={"train": 6, "val": 2},
            class_rows={"train": (3, 3), "val": (1, 1)}, mean_rgb=(1.0, 2.0, 3.0), kinds={"gray": 1},
            covariance_rgb=((3.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0)), eigenvalues=(3.0, 2.0, 1.0),
            eigenvectors=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), mean_image_sha256="0" * 64, shards=shards,
        )  # fmt: skip
        found.append(made.sealed().model_dump_json().encode())
    return found


def config_yaml() -> list[bytes]:
    return [digits().to_yaml().encode(), b"lr: 0.01\nepochs: 3\nlayout: columns\nworkers: 2..8\nflip: yes\n"]


def search_yaml() -> list[bytes]:
    from orchestrator.search.recipes import SEARCHES

    return [SEARCHES["digits"]().to_yaml().encode()]


def cluster_yaml() -> list[bytes]:
    kinds = {
        "head": {"resources": {"CPU": 4}, "node_config": {}},
        "gpu": {"resources": {"CPU": 8, "GPU": 2}, "labels": {"usd-per-hour": "3.06"}, "max_workers": 4},
    }
    whole = {"cluster_name": "x", "max_workers": 8, "provider": {"type": "aws"}, "head_node_type": "head"}
    return [yaml.safe_dump(whole | {"available_node_types": kinds}).encode(), json.dumps(whole).encode()]


def result_json() -> list[bytes]:
    result = {
        "schema_version": 2, "name": "a", "status": "finished", "recipe": "digits", "config": digits().model_dump(),
        "history": [{"epoch": 1, "train/loss": 2.0}], "metrics": {"val/top1_error": 0.5}, "best": {"epoch": 1},
        "classes": list(CLASSES), "cost_usd": None, "elapsed_s": 3.0, "checkpoint": "x",
        "per_class": [{"class": "cat", "top1_error": 0.5, "best_top1_error": 0.5}],
    }  # fmt: skip
    return [json.dumps(result, indent=1).encode()]


def checkpoint() -> dict[str, bytes]:
    """The files of one, of a net of one small layer (see targets.tiny_net)."""
    from targets import tiny_net

    from orchestrator.train import checkpoints

    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(Path(folder), *tiny_net(), checkpoints.State(epoch=1, losses=[1.0]))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def model(suffix: str) -> bytes:
    """A net of one file, of the smallest width."""
    preset = {".pth": "torchvision", ".caffemodel": "caffe"}.get(suffix, "paper")
    build = {"preset": preset, "num_classes": 2, "width": 1 / 16, "input_size": 67}
    net = alexnet.build(preset, 2, width=1 / 16, input_size=67)
    mean = np.full((72, 72, 3), 100, np.float32)
    trained = alexnet.TrainedNet(net, alexnet.Description(build, CLASSES, pixel_scale=1 / 64), mean)
    with tempfile.TemporaryDirectory() as folder:
        alexnet.weights.write(trained, Path(folder, "x" + suffix))
        return Path(folder, "x" + suffix).read_bytes()


@functools.cache
def model_folder() -> dict[str, bytes]:
    """The files of a model's folder, whose net is that of `model`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.safetensors").write_bytes(model(".safetensors"))
        alexnet.load(Path(folder, "x.safetensors")).save(Path(folder, "model"))
        return {path.name: path.read_bytes() for path in Path(folder, "model").iterdir()}


def label_sets() -> list[bytes]:
    names = {f"val/{CLASSES[i % 2]}/{i}.jpg": [i % 2, CLASSES[0]] for i in range(4)}
    return [json.dumps([[0], [1, 0], [], [1]]).encode(), json.dumps(names).encode()]


def state_json() -> list[bytes]:
    return [checkpoint()["state.json"]]


def safetensors() -> list[bytes]:
    return [checkpoint()["model.safetensors"]]
