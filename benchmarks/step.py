"""What does a training step of the full net cost, beside torchvision's AlexNet?

    python benchmarks/step.py --precision fp32 bf16

torchvision's net is the 2014 variant without LRN, of nearly the same arithmetic. Both train on the same random batch:
forward, cross-entropy, backward, update (ours by the paper's rule, theirs by torch.optim.SGD), in channels_last, in
one process, in turns.
"""

import functools
import statistics

import measure
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import alexnet
from orchestrator.train.rendezvous import wants_bf16


def step(net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, bf16: bool) -> None:
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        scores = net(images)
    F.cross_entropy(scores.float(), labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if images.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    flags = measure.parser(__doc__, "step")
    flags.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "auto"], default=["fp32", "bf16"])
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    flags.add_argument(
        "--keep-default-malloc", action="store_true", help="leave glibc's allocator as it is, to see what that costs"
    )
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    kept = not args.keep_default_malloc and alexnet.keep_freed_memory()
    device = torch.device(args.device)

    images = torch.randn(args.batch_size, 3, 224, 224).contiguous(memory_format=torch.channels_last).to(device)
    labels = torch.randint(0, 1000, (args.batch_size,)).to(device)
    ours = alexnet.build("paper", 1000, init="he").to(device)
    theirs = torchvision.models.alexnet().to(device, memory_format=torch.channels_last)
    optimizers = (
        alexnet.PaperSGD(ours.parameters(), lr=1e-5),
        torch.optim.SGD(theirs.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4),
    )
    results = {}
    for precision in args.precision:
        bf16 = wants_bf16(precision, device)
        contenders = {
            "ours": functools.partial(step, ours, optimizers[0], images, labels, bf16),
            "torchvision": functools.partial(step, theirs, optimizers[1], images, labels, bf16),
        }
        times = measure.take_turns(contenders, args.rounds)
        rates = {name: args.batch_size / statistics.median(values) for name, values in times.items()}
        ratio = measure.median_ratio(times["torchvision"], times["ours"])
        name = f"{precision} ({'bf16' if bf16 else 'fp32'})" if precision == "auto" else precision
        print(f"{name}: ours {rates['ours']:.1f} images/s, torchvision {rates['torchvision']:.1f}: {ratio:.2f} of it")
        results[name] = {"images_per_s": rates, "ours_over_torchvision": ratio}
    measure.write(
        args.json,
        {"device": args.device, "batch_size": args.batch_size, "freed_memory_kept": kept, "precision": results},
    )


if __name__ == "__main__":
    main()
