"""benchmarks/gpu.py, on the CPU: it must not fail for a slip on a GPU that is rented by the hour."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments, code=None):
    """The script, or a program in whose place it is imported; the status, the output and the errors."""
    command = [sys.executable, *(["-c", code] if code else [SCRIPT]), *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": paths}, cwd=ROOT
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts", [("machine", "agree", "lrn", "memory", "feed", "resume"), ("step",), ("layouts", "tests")], ids=" ".join
)
def test_every_part_runs_in_a_tiny_form(parts, tmp_path):
    """But job, which is jobs/train.py."""
    file = tmp_path / "gpu.json"
    status, out, errors = run("--device", "cpu", "--quick", "--rounds", 1, "--json", file, "--parts", *parts)
    found = json.loads(file.read_text())
    assert status == 0, (out, errors, found)
    assert (found["device"], found["quick"], list(found["parts"])) == ("cpu", True, list(parts))
    assert {part["status"] for part in found["parts"].values()} == {"ok"}
    results = {name: part["result"] for name, part in found["parts"].items()}
    if "lrn" in parts:
        assert results["machine"]["copy_bytes_per_s"] > 0
        for each in results["agree"].values():
            assert len(each["losses_apart"]) == 3
            assert max(*each["losses_apart"], *each["gradients_apart"].values()) < 1e-12
        assert [row["shape"] for row in results["lrn"]["forward_and_backward"]] == [[2, 96, 5, 5], [2, 256, 3, 3]] * 2
        assert results["resume"]["losses"] == results["resume"]["wanted"]
        assert results["resume"]["repeats_exactly"]
        loops = {"no_copies", "copies_in_line", "copies_beside", "cut_on_the_device"}
        assert set(results["feed"]["batch 4, bf16"]["images_per_s"]) == loops
    if "step" in parts:
        contenders = {"ours", "torchvision", "torchvision_compiled", "ours_cudnn_benchmark"}
        assert set(results["step"]["tf32, batch 4"]["images_per_s"]) == contenders
        assert set(results["step"]["bf16, batch 4"]["images_per_s"]) == contenders | {"ours_compiled"}
    if "layouts" in parts:
        assert max(results["layouts"]["losses_apart"].values()) < 1e-4
        assert "skipped" in results["tests"]["summary"] or torch.cuda.is_available()


BROKEN = """
import sys, gpu
def fail(machine): raise RuntimeError("no such kernel")
def wrong(machine): raise gpu.Wrong("0.5 apart", {"apart": 0.5})
def well(machine): return {"x": 1}
def late(machine): machine.end = 0; return {}
gpu.PARTS.clear()
gpu.PARTS.update(fail=fail, wrong=wrong, well=well, late=late, never=well)
sys.exit(gpu.main())
"""


def test_a_part_that_fails_is_recorded_the_rest_goes_on_and_none_begins_after_the_budget(tmp_path):
    file = tmp_path / "gpu.json"
    status, out, errors = run("--device", "cpu", "--json", file, code=BROKEN)
    parts = json.loads(file.read_text())["parts"]
    assert status == 1, errors
    assert [part["status"] for part in parts.values()] == ["failed", "failed", "ok", "ok", "not run"]
    assert parts["fail"]["error"] == "RuntimeError: no such kernel"
    assert "in fail" in parts["fail"]["traceback"]
    assert (parts["wrong"]["error"], parts["wrong"]["result"]) == ("0.5 apart", {"apart": 0.5})
    assert "failed: fail, wrong" in out
    assert "not run: never" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line():
    status, out, errors = run()
    assert (status, out) == (2, "")
    assert errors.splitlines() == [
        "gpu.py: error: PyTorch sees no GPU here; --device cpu --quick tries the script without one"
    ]
