"""Preparations, started as a user starts them; tests/data has what they compute."""

import re

import pytest
from conftest import only_line, refused, started


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--source", "nowhere", "--output", "out"], "nowhere: no such folder"),
        (["--output", "out"], "the following arguments are required: --source (or --check DIR)"),
        (["--check", "nowhere"], "nowhere: no such folder"),
        (["--check", "out", "--source", "digits"], "--check: takes neither --source nor --output"),
        (["--source", "digits", "--output", "out", "--picture", "x.png"], "--picture: only --check draws one"),
        (["--source", "digits", "--output", "out", "--encoding", "png"], "invalid choice: 'png'"),
        (["--source", "digits", "--output", "out", "--max-rejected", "2"], "must be between 0 and 1"),
        (["--source", "digits", "--output", "out", "--jpeg-quality", "101"], "must be between 1 and 100"),
    ],
)
def test_a_wrong_preparation_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, words):
    assert words in refused("prepare", args, tmp_path, monkeypatch, capsys)


@pytest.mark.ray
@pytest.mark.slow
def test_prepare_counts_what_it_rejected_on_its_last_line(job, photographs, tmp_path, here, monkeypatch, capsys):
    (photographs / "train" / "apple" / "broken.JPEG").write_bytes(b"no picture")
    done = job(
        "prepare", "--source", photographs, "--output", tmp_path / "out", "--max-rejected", "0.1", cwd=tmp_path, **here
    )
    assert done.returncode == 0, done.stderr
    assert re.match(
        r"32 rows \(24 train, 8 val\), 1 rejected, listed in .*rejected\.jsonl", done.stdout.splitlines()[-1]
    )
    again = ["--source", photographs, "--output", tmp_path / "out"]
    status, out, err = started("prepare", again, tmp_path, monkeypatch, capsys, **here)
    assert status == 2
    assert "already contains a data set" in only_line(out, err)
    strict = ["--source", photographs, "--output", tmp_path / "strict"]
    status, out, err = started("prepare", strict, tmp_path, monkeypatch, capsys, **here)
    assert status == 1
    assert "1 of 33 files could not be read" in only_line(out, err)
