"""docs/formats.md names exactly the fields that files have.

Its tables of settings are made from the models. After a change of those: UPDATE_DOCS=1 python -m pytest THIS_FILE
"""

import ast
import json
import os
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from pydantic import BaseModel

from orchestrator.base.schema import KEY
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.config.train import TrainConfig
from orchestrator.data import shards
from orchestrator.data.shard_writer import ShardWriter, pack
from orchestrator.data.shards import Manifest, Shard
from orchestrator.data.sources import Entry
from orchestrator.models import evaluation_files
from orchestrator.models.evaluate import Data, Evaluation, Result
from orchestrator.models.metrics import calibration, compare
from orchestrator.models.shard_rows import Rows
from orchestrator.search.analysis import as_result
from orchestrator.search.config import SearchSettings, make_search
from orchestrator.search.entries import KINDS, EpochEnded, TrialProposed
from orchestrator.search.journal import Journal
from orchestrator.train.checkpoints import State

ROOT = Path(__file__).parent.parent
FORMATS = ROOT / "docs" / "formats.md"


def table(title: str) -> dict[str, list[str]]:
    """The other cells of each row of the table below a heading, by the name in its first cell."""
    text = FORMATS.read_text()
    section = re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in section.splitlines() if line[:2] == "| "]
    return {row[0].strip("`"): row[1:] for row in rows[1:]}


def json_type(schema: dict) -> str:
    """A JSON schema in the words of the document."""
    if "anyOf" in schema:
        return " or ".join(json_type(part) for part in schema["anyOf"])
    if "$ref" in schema:
        return "object"
    if schema["type"] == "array":
        return f"array of {json_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {json_type(schema['additionalProperties'])}"
    return schema["type"]


def types_of(model: type[BaseModel]) -> dict[str, str]:
    return {name: json_type(field) for name, field in model.model_json_schema()["properties"].items()}


@pytest.mark.parametrize(
    ("title", "model"),
    [("manifest.json", Manifest), ("A shard in manifest.json", Shard), ("State in state.json", State)],
)
def test_the_fields_of_a_model_are_described_in_order_and_with_their_types(title, model):
    assert [(name, row[0]) for name, row in table(title).items()] == list(types_of(model).items())


def settings_table(model: type[BaseModel]) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, kind in types_of(model).items():
        field = model.model_fields[name]
        lines.append(f"| `{name}` | {kind} | {json.dumps(field.default)} | {field.description} |")
    return "\n".join(lines)


def with_settings(text: str) -> str:
    for model in (TrainConfig, SearchSettings):
        mark = f"<!-- {model.__name__} -->"
        text = re.sub(
            f"{mark}.*?<!-- end -->",
            lambda _, mark=mark, model=model: f"{mark}\n{settings_table(model)}\n<!-- end -->",
            text,
            flags=re.S,
        )
    return text


def test_the_settings_are_described_as_the_models_do():
    if os.environ.get("UPDATE_DOCS"):
        FORMATS.write_text(with_settings(FORMATS.read_text()))
    text = FORMATS.read_text()
    assert text == with_settings(text), "run: UPDATE_DOCS=1 python -m pytest tests/test_formats.py"


def test_columns_of_shards_are_those_of_the_schema():
    columns = {name: row[0] for name, row in table("Shards").items()}
    assert columns == {field.name: str(field.type) for field in shards.schema("jpeg", 256)}
    raw = shards.schema("raw", 256)
    assert raw.names == list(columns)
    assert str(raw.field("image").type) == f"fixed_size_binary[{3 * 256**2}]"


def test_notes_and_rejected_files_have_the_fields_described(tmp_path):
    png = tmp_path / "a.png"
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png)
    entries = [Entry(0, 0, "a.png", path=str(png)), Entry(1, 0, "b.png", data=b"no image")]
    result = ShardWriter(StoragePath.of(tmp_path / "out"), 8, 90, 1)(
        pack("train", "train/shard-00000.parquet", entries)
    )
    assert result["failure"] == ""
    with np.load(tmp_path / "out" / shards.UNFINISHED / "train/shard-00000.parquet.npz") as note:
        described = table("_unfinished/")
        assert set(note.files) == set(described)
        assert note[KEY] == 1
        for name in ("sums", "products"):
            assert described[name][0].split()[0] == str(note[name].dtype)
    [rejected] = json.loads(result["report"])["rejected"]
    assert [*rejected, "kind"] == list(table("rejected.jsonl")), "which only what was left out has"


def events_written() -> dict[str, set[str]]:
    """The fields of every entry that a journal can have, by its event."""
    return {event: {field.name for field in fields(kind)} for event, kind in KINDS.items()}


def test_events_of_the_journal_are_described():
    described = {event: set(re.findall(r"`(\w+)`", row[0])) for event, row in table("journal.jsonl").items()}
    assert events_written() == described


EPOCH = {
    "epoch": 1, "step": 23, "train/loss": 2.0, "train/lr": 0.01, "train/images_per_s": 100.0, "val/loss": 1.0,
    "val/top1_error": 0.5, "val/top5_error": 0.1, "train/top1_error": 0.4,
}  # fmt: skip


def keys_of_result(path: str) -> set[str]:
    """What the code puts into its result, beside what `as_result` returns."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target) in ("result", "self.result"):
            for part in ast.walk(node.value):
                if isinstance(part, ast.Dict) and part in (node.value, getattr(node.value, "orelse", None)):
                    found |= {key.value for key in part.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            found |= set(re.findall(r"^(?:self\.)?result\['(\w+)'\]$", target))
    return found


def test_fields_of_a_runs_result_are_described():
    assert keys_of_result("orchestrator/train/session.py") | {KEY} == set(table("Of a run"))


def test_fields_of_a_searchs_result_are_described(tmp_path):
    search = make_search({}, digits(), {"lr": {"loguniform": [0.001, 0.1]}})
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(TrialProposed(0, {"lr": 0.01}))
    journal.write(EpochEnded(0, EPOCH))
    result = as_result(search, journal, 360)
    journal.close()
    keys = set(result) | keys_of_result("orchestrator/search/search.py")
    assert keys | {KEY} == set(table("Of a search"))
    assert list(result["trials"][0]) == list(table("A trial"))
    assert list(EPOCH) == list(table("An epoch"))


def test_fields_of_an_evaluation_are_described():
    wrong = np.array([True, False])
    manifest = Manifest.model_construct(classes=("a", "b"), shards=())
    data = Data(StoragePath("/shards"), manifest, "val", Rows(np.arange(2), np.arange(2), ["x", "y"]))
    calibrated = calibration(np.array([0.5, 0.9]), wrong)
    result = Result("x", 1, ("a", "b"), ("a", "b"), 1.0, np.arange(2), np.array([1, 1]), wrong, None, calibrated)
    done = Evaluation([result], None, [("x", "y", compare(wrong, wrong))], 0, 1.0)
    document = evaluation_files.as_json(done, data, None)
    assert list(document) == list(table("evaluation.json"))
    [model], [comparison] = document["models"], document["comparisons"]
    described = table("A model in evaluation.json")
    assert list(model) == list(described)
    assert list(comparison) == list(table("A comparison in evaluation.json"))
    for name in ("calibration", "per_class", "confused"):
        assert model[name][0].keys() <= set(re.findall(r"`(\w+)`", described[name][1]))
    columns = {name: row[0] for name, row in table("predictions.parquet").items()}
    assert columns == {field.name: str(field.type) for field in evaluation_files.PREDICTION_SCHEMA}
