"""How much faster is the fused LRN than nn.LocalResponseNorm, forward and backward?

    python benchmarks/lrn.py

Both work on channels_last float32 batches of the paper's two sizes. Ours has two columns; PyTorch's layer is timed as
one call over all maps. A second pair of contenders does what training needs: ReLU, then LRN within each column.
"""

import functools
import statistics
from collections.abc import Callable

import measure
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import alexnet

SHAPES = [(128, 96, 55, 55), (128, 256, 27, 27)]


def main() -> None:
    args = measure.parser(__doc__, "lrn").parse_args()
    torch.set_num_threads(args.threads)
    alexnet.keep_freed_memory()
    results = []
    for shape in SHAPES:
        a = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
        grad = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        plain_grad = grad.contiguous()
        plain = a.detach().contiguous().requires_grad_()  # NCHW memory, which suits PyTorch's layer better
        theirs = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # PyTorch's alpha is n times the paper's

        def torch_lrn(x: Tensor, theirs: nn.Module = theirs) -> Tensor:
            return torch.cat([theirs(half) for half in x.chunk(2, 1)], 1)

        def ours(x: Tensor) -> Tensor:
            return alexnet.local_response_norm(x, columns=2)

        def ours_with_relu(x: Tensor) -> Tensor:
            return alexnet.local_response_norm(x, columns=2, relu=True)

        def torch_with_relu(x: Tensor, lrn: Callable[[Tensor], Tensor] = torch_lrn) -> Tensor:
            return lrn(F.relu(x))

        def run(function: Callable[[Tensor], Tensor], a: Tensor = a, grad: Tensor = grad) -> None:
            torch.autograd.grad(function(a), a, grad)

        times = measure.take_turns(
            {
                "ours": functools.partial(run, ours),
                "torch": functools.partial(run, theirs),
                "torch_contiguous": functools.partial(run, theirs, plain, plain_grad),
                "ours_with_relu": functools.partial(run, ours_with_relu),
                "torch_two_columns_with_relu": functools.partial(run, torch_with_relu),
            },
            args.rounds,
        )
        seconds = {name: statistics.median(values) for name, values in times.items()}
        best = min("torch", "torch_contiguous", key=lambda name: seconds[name])
        ratio = measure.median_ratio(times[best], times["ours"])
        ratio_relu = measure.median_ratio(times["torch_two_columns_with_relu"], times["ours_with_relu"])
        print(f"{shape}: ours {seconds['ours']:.3f} s, {best} {seconds[best]:.3f} s: {ratio:.1f} times faster")
        print(f"{shape}: with the ReLU before it, within columns: {ratio_relu:.1f} times faster")
        results.append(
            {"shape": shape, "seconds": seconds, "times_faster": ratio, "times_faster_with_relu": ratio_relu}
        )
    measure.write(args.json, {"forward_and_backward": results})


if __name__ == "__main__":
    main()
