"""A few seconds of the fuzzer, with a fixed seed; `make fuzz` runs it for an hour."""

import random
import subprocess
import sys

import fuzz
import mutate
import pytest
import seeds

QUICK = (
    "zip",
    "tar",
    "webdataset",
    "csv",
    "jsonl",
    "png",
    "jpeg",
    "gif",
    "config.yaml",
    "cluster.yaml",
    "result.json",
    "real.json",
)


def test_damaged_files_end_in_a_result_or_one_line(tmp_path):
    """Others than the formats whose children are forked, or whose libraries take long to import."""
    script = (
        "import sys, random; sys.path[:0] = sys.argv[1:3]; import fuzz; from pathlib import Path\n"
        "reader, rng = fuzz.Reader(Path(sys.argv[3])), random.Random(7)\n"
        "for form, sound in reader.check_seeds(sys.argv[4:]).items():\n"
        "    for _ in range(30):\n"
        "        data = reader.targets[form].damage(rng.choice(sound), sound, rng)\n"
        "        found = reader.read(form, data)\n"
        "        if found['fault']: print(form, found['fault'], found['trace'], data[:200])\n"
        "        print('read' if found['outcome'] == 'read' else 'refused')\n"
    )
    where = [str(fuzz.ROOT / "tests/fuzz"), str(fuzz.ROOT), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", script, *where, *QUICK], capture_output=True, text=True, timeout=500, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert set(lines) == {"read", "refused"}, [line for line in lines if line not in ("read", "refused")]
    assert len(lines) == 30 * len(QUICK)


def test_the_same_seed_makes_the_same_damage():
    sound = seeds.zip_archive()
    made = [[mutate.damaged(sound[0], sound, random.Random(n)) for n in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 40


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (None, None),
        (ValueError("x.zip: damaged"), None),
        (ValueError("two\nlines"), "raised an error that is not one line"),
        (ValueError(""), "raised an error that is not one line"),
        (ValueError("x" * 2000), "raised an error that is not one line"),
        (KeyError("x"), "raised KeyError"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "x"), "raised UnicodeDecodeError"),
        (MemoryError(), "raised MemoryError"),
    ],
)
def test_what_counts_as_a_fault(error, fault):
    assert fuzz._fault(error) == fault


def test_a_file_that_is_written_elsewhere_and_a_program_that_is_started_are_seen(tmp_path):
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import fuzz; from pathlib import Path\n"
        "guard = fuzz.Guard(Path(sys.argv[2]) / 'in'); guard.on = True\n"
        "open(Path(sys.argv[2]) / 'in' / 'x', 'w').close(); open(sys.argv[3]).close()\n"
        "out = sys.argv[2] + '/out'\n"
        "for act in (lambda: open(out, 'w'), lambda: os.mkdir(out), lambda: os.system('true')):\n"
        "    try: act()\n"
        "    except fuzz.Escaped: print('seen')\n"
    )
    (tmp_path / "in").mkdir()
    where = [str(fuzz.ROOT / "tests/fuzz"), str(tmp_path), fuzz.__file__]
    done = subprocess.run([sys.executable, "-c", script, *where], capture_output=True, text=True)
    assert done.stdout.split() == ["seen"] * 3, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
