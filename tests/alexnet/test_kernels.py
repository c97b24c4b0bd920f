"""After set-up nothing is left to compile for a training step."""

import os
import subprocess
import sys

PROGRAM = """
import numba.core.dispatcher, numpy as np, torch
import alexnet
from alexnet.augment import crop_flip_shift, draw
from alexnet.kernels import compile_kernels

compiled = set()
original = numba.core.dispatcher._FunctionCompiler.compile

def compile(self, *args):
    compiled.add(self.py_func.__name__)
    return original(self, *args)

numba.core.dispatcher._FunctionCompiler.compile = compile
compile_kernels()
print(*sorted(compiled))
compiled.clear()
for dtype in (torch.float32, torch.bfloat16):
    net = alexnet.build("paper", 10, width=0.0625, input_size=64).to(dtype)
    net(torch.zeros(2, 3, 64, 64, dtype=dtype)).sum().backward()
pixels = np.zeros((4, 80, 80, 3), np.uint8)
crop_flip_shift(pixels, draw(np.arange(4), seed=0, epoch=0, margin=16), np.ones((4, 3), np.float32), 64)
print(*sorted(compiled))
"""


def test_set_up_has_compiled_what_a_training_step_needs(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    before, after = done.stdout.split("\n")[:2]
    assert {"_forward_rows", "_backward_rows", "_crop_flip_shift"} <= set(before.split())
    assert after == ""
