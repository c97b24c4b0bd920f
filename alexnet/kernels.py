"""Compiles what numba compiles for training, so that its first step does not: `make setup` runs it, on every node."""

import numpy as np
import torch

from . import augment, lrn_cpu, winograd_cpu


def compile_kernels() -> None:
    """Compile for the types that trainings use; the result stays beside the source, or in numba's own cache."""
    for dtype in (torch.float32, torch.bfloat16):
        maps = torch.zeros(1, 8, 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
        papers = (1, 2.0, 5, 1e-4, 0.75, True)  # columns, k, n, alpha, beta, ReLU; others have the same types
        lrn_cpu.forward(maps, *papers)
        lrn_cpu.backward(maps, maps, *papers)
    image_NHWC = torch.zeros(1, 5, 5, 1)
    values = winograd_cpu.input_transform(image_NHWC, 1)
    winograd_cpu.output_transform(values, torch.zeros(1), image_NHWC)
    winograd_cpu.input_adjoint(winograd_cpu.output_adjoint(image_NHWC, 1), image_NHWC)
    winograd_cpu.kernel_adjoint(winograd_cpu.kernel_transform(torch.zeros(1, 1, 3, 3), 1), torch.zeros(1, 3, 3, 1))
    pixels = np.zeros((1, 2, 2, 3), np.uint8)
    augment.crop_flip_shift(pixels, augment.center(1, margin=1), np.zeros((1, 3), np.float32), 1)


if __name__ == "__main__":
    compile_kernels()
