"""What a net costs before it is built: parameters, arithmetic, memory."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .net import LRN, AlexNet, num_parameters


@dataclass(frozen=True)
class Cost:
    """Of one training step on one device, in float32."""

    num_parameters: int
    training_flops: float  # an image, forward and backward; a multiply-add counts as two
    memory_bytes: float  # weights, gradients, velocities and the activations kept for the backward pass


def estimate(*, num_classes: int, input_size: int, width: float, batch_size: int) -> Cost:
    """Run the shapes through a net that has no memory of its own (torch's meta device)."""
    with torch.device("meta"):
        net = AlexNet(num_classes, input_size=input_size, width=width, lrn=LRN())
        kept, multiply_adds = input_size * input_size * 3, 0
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.MaxPool2d):
                layer.register_forward_hook(lambda layer, inputs, output: sizes.append((layer, output)))
        sizes: list[tuple[nn.Module, Tensor]] = []
        net(torch.empty(1, 3, input_size, input_size))
    for layer, output in sizes:
        # a convolution's output is kept by ReLU or LRN; what LRN makes of it is as large, and kept by the pooling
        kept += output.numel() * (2 if isinstance(layer, nn.Conv2d) else 1)
        if isinstance(layer, nn.Conv2d):
            multiply_adds += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            multiply_adds += layer.weight.numel()
    total = num_parameters(net)
    return Cost(total, 3 * 2 * multiply_adds, 4.0 * (3 * total + batch_size * kept))
