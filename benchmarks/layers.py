"""What does each layer of the full net cost, and how near is it to the machine's matmul peak?

    python benchmarks/layers.py --precision fp32 bf16

Every layer's forward and backward pass, with inputs as they are in a training step, batch of 128, channels_last; one at
a time. GFLOP/s are multiply-adds, counted as two, by the second; the backward pass of a layer makes twice as many as
the forward pass, but for the first, whose input needs no gradient. The peak is PyTorch's own product of matrices of
2048 x 2048; where its library makes little of a CPU, as MKL of an AMD EPYC in fp32, convolutions, which are oneDNN's,
are beyond it.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor, nn

import alexnet
from alexnet.lrn import LocalResponseNorm

KINDS = (nn.Conv2d, nn.Linear, nn.MaxPool2d, LocalResponseNorm)


def peak(dtype: torch.dtype, rounds: int) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    times = measure.take_turns({"matmul": lambda: a @ b}, rounds)["matmul"]
    return 2 * 2048**3 / statistics.median(times)


def seen_inputs(net: nn.Module, images: Tensor, bf16: bool) -> list[tuple[str, nn.Module, Tensor]]:
    """Name, module and input of every layer of a forward pass, in order."""
    names, found = dict(map(reversed, net.named_modules())), []  # type: ignore[arg-type]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, x: found.append((names[layer], layer, x[0].detach().clone())))
        for layer in net.modules()
        if isinstance(layer, KINDS)
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        net(images)
    for hook in hooks:
        hook.remove()
    return found


def time_layer(layer: nn.Module, x: Tensor, is_first: bool, bf16: bool, rounds: int) -> tuple[float, float, Tensor]:
    """Median seconds of the forward pass, and of the backward pass; and the output."""
    x = x.requires_grad_(not is_first)
    wanted = [*([] if is_first else [x]), *layer.parameters()]

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found: Tensor = layer(x)
        return found

    out = forward()
    gradient = torch.randn_like(out)
    backward: Callable[[], Any] = functools.partial(torch.autograd.grad, out, wanted, gradient, retain_graph=True)
    times = measure.take_turns({"forward": forward, "backward": backward}, rounds)
    return statistics.median(times["forward"]), statistics.median(times["backward"]), out.detach()


def multiply_adds(layer: nn.Module, out: Tensor) -> int:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return int(out.numel() * layer.weight[0].numel())
    return 0


def main() -> None:
    flags = measure.parser(__doc__, "layers")
    flags.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--preset", default="paper")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    alexnet.keep_freed_memory()
    torch.manual_seed(0)
    net = alexnet.build(args.preset, 1000, init="he")
    images = torch.randn(args.batch_size, 3, net.input_size, net.input_size)
    images = images.contiguous(memory_format=torch.channels_last)
    results: dict[str, Any] = {}
    for precision in args.precision:
        bf16 = precision == "bf16"
        limit = peak(torch.bfloat16 if bf16 else torch.float32, args.rounds)
        rows: list[tuple[str, float, float, float, float]] = []
        for name, layer, x in seen_inputs(net, images, bf16):
            forward, backward, out = time_layer(layer, x, not rows, bf16, args.rounds)
            flops = 2 * multiply_adds(layer, out)
            rows.append((name, forward, backward, flops / forward, flops * (2 if rows else 1) / backward))
        total = sum(row[1] + row[2] for row in rows)
        print(f"{precision}: matmul peak {limit / 1e9:.0f} GFLOP/s, layers {1000 * total:.0f} ms")
        print(f"{'layer':<10} {'forward':>19} {'backward':>19}  share of the step")
        for name, forward, backward, forward_rate, backward_rate in rows:
            cells = "".join(
                f" {1000 * seconds:7.1f} ms {100 * rate / limit:7.0f} %"
                for seconds, rate in ((forward, forward_rate), (backward, backward_rate))
            )
            print(f"{name:<10}{cells}  {100 * (forward + backward) / total:5.1f} %")
        keys = ("layer", "forward_s", "backward_s", "forward_flop_per_s", "backward_flop_per_s")
        results[precision] = {"peak_flop_per_s": limit, "layers": [dict(zip(keys, row, strict=True)) for row in rows]}
    measure.write(args.json, {"batch_size": args.batch_size, "preset": args.preset, "precision": results})


if __name__ == "__main__":
    main()
