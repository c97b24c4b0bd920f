"""What a trained net learned and why it answers as it does: colours of kernels, maps, Grad-CAM, nearest images.

N images, C maps, H rows, W columns of pixels, U units of the last hidden layer (fc7), K classes, Q queries. Images are
(N, S, S, 3) uint8, as stored; the net sees their centre crop.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from . import augment
from .trained import TrainedNet

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]

NOISE = 2 / 3  # colouredness of independent noise in the three colours


def colouredness(kernels: Floats) -> NDArray[np.float64]:
    """The share of each kernel's energy (sum of squares) that is not gray; (C,) of kernels (C, 3, H, W).

    The gray part of a weight is the mean over its three colours. A gray kernel has 0, one whose colours cancel out,
    such as red against green, 1, one that reads red alone 2/3, and so has noise (NOISE). Kernels of zeros have 0.
    """
    energy = np.square(kernels, dtype=np.float64).sum(axis=(1, 2, 3))
    gray = 3 * np.square(kernels.mean(axis=1, dtype=np.float64)).sum(axis=(1, 2))
    gray_share = np.divide(gray, energy, out=np.ones_like(energy), where=energy > 0)
    found: NDArray[np.float64] = np.clip(1 - gray_share, 0, 1)
    return found


def colouredness_of_columns(kernels: Floats, columns: int) -> list[float]:
    """The mean over each column's kernels. In the paper (6.1) one column is nearly gray, the other coloured."""
    return [float(part.mean()) for part in np.split(colouredness(kernels), columns)]


def center_crop(trained: TrainedNet, images: Images) -> Images:
    """What the net sees of images: (N, input_size, input_size, 3)."""
    side, size = trained.image_size, trained.net.input_size
    first = (side - size) // 2
    return images[:, first : first + size, first : first + size]


def features_and_probabilities(trained: TrainedNet, images: Images) -> tuple[Floats, Floats]:
    """The outputs (N, U) of the last hidden layer, fc7 after ReLU, and the probabilities (N, K)."""
    found: list[Tensor] = []
    handle = _last(trained.net, nn.Linear).register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    try:
        scores = trained.scores(np.ascontiguousarray(images), _center(trained, len(images)))
    finally:
        handle.remove()
    return found[0].float().cpu().numpy(), torch.softmax(scores.float(), 1).cpu().numpy()


def feature_maps(trained: TrainedNet, image: Images) -> dict[str, Floats]:
    """The maps (C, H, W) of one image (S, S, 3) after each convolution and ReLU, by the layer's name."""
    found: dict[str, Floats] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            found[name] = F.relu(output[0]).float().cpu().numpy()  # a copy: the net's ReLU may work in place

        return hook

    layers = [(name, layer) for name, layer in trained.net.named_children() if isinstance(layer, nn.Conv2d)]
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers]
    try:
        trained.scores(np.ascontiguousarray(image[None]), _center(trained, 1))
    finally:
        for handle in handles:
            handle.remove()
    return found


def grad_cam(trained: TrainedNet, images: Images, labels: NDArray[np.int64]) -> Floats:
    """Where the last convolution's maps speak for a class: (N, H, W) of at least 0, for the i-th image's labels[i].

    The sum over maps of each map, after ReLU, times the mean over its positions of the derivative of the class's score
    before the softmax with respect to it; its positive part (Selvaraju et al. 2017).
    """
    net, maps, is_due = trained.net, list[Tensor](), False

    def due(module: Any, args: Any, output: Tensor) -> None:
        nonlocal is_due
        is_due = True

    def cut(module: Any, args: Any) -> Any:
        """What enters the first layer after the last convolution are its maps after ReLU: derivatives begin there."""
        if not is_due or maps:
            return None
        maps.append(args[0].detach().requires_grad_())
        return (maps[0].clone(), *args[1:])

    handles = [_last(net, nn.Conv2d).register_forward_hook(due)]
    handles += [layer.register_forward_pre_hook(cut) for layer in net.children()]
    try:
        with torch.enable_grad():
            scores = net(trained.inputs(np.ascontiguousarray(images), _center(trained, len(images))))
            chosen = scores.gather(1, torch.from_numpy(labels).to(scores.device)[:, None])
            (gradient,) = torch.autograd.grad(chosen.sum(), maps[0])
    finally:
        for handle in handles:
            handle.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    heat: Floats = F.relu((weights * maps[0].detach()).sum(dim=1)).float().cpu().numpy()
    return heat


class Nearest:
    """The k images nearest to each of Q queries, by the Euclidean distance of their features; exact.

    Features come in parts, of which only the nearest are kept. Of equally distant images the first wins.
    """

    def __init__(self, queries: Floats, k: int) -> None:
        """queries: (Q, U)."""
        self.queries, self.k, self.seen = torch.from_numpy(queries), k, 0
        self.distances = torch.empty(len(queries), 0)
        self.positions = torch.empty(len(queries), 0, dtype=torch.long)  # in the order in which images came

    def add(self, features: Floats) -> None:
        """(N, U) of the next images."""
        # by differences: the expanded square loses the digits of small distances
        far = torch.cdist(self.queries, torch.from_numpy(features), compute_mode="donot_use_mm_for_euclid_dist")
        places = torch.arange(self.seen, self.seen + len(features)).expand(len(self.queries), -1)
        distances, positions = torch.cat([self.distances, far], 1), torch.cat([self.positions, places], 1)
        order = distances.argsort(dim=1, stable=True)[:, : self.k]
        self.distances, self.positions = distances.gather(1, order), positions.gather(1, order)
        self.seen += len(features)


def principal_plane(features: Floats, dimensions: int = 2) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates (N, dimensions) along the directions of greatest variance, and each one's share of the variance.

    Directions are turned so that the coordinate farthest from 0 is positive. No more dimensions than N or U.
    """
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    found = (left * values)[:, :dimensions]
    farthest = found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])]
    total = np.square(values).sum()
    share = np.square(values[:dimensions]) / (total if total > 0 else 1)
    return found * np.where(farthest < 0, -1.0, 1.0), share


def _center(trained: TrainedNet, count: int) -> augment.Draws:
    return augment.center(count, margin=trained.image_size - trained.net.input_size)


def _last(net: nn.Module, kind: type[nn.Module]) -> nn.Module:
    return [layer for layer in net.children() if isinstance(layer, kind)][-1]
