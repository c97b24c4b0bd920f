"""Where a worker's net starts from: its run's last checkpoint, another run's, a trained net, or nothing."""

from pathlib import Path

import ray.train
from torch.optim.lr_scheduler import ReduceLROnPlateau

from alexnet import PaperSGD, WeightAverage
from alexnet.layouts import ShardedNet
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.shards import Manifest
from orchestrator.train import checkpoints, record
from orchestrator.train.messages import StartFrom
from orchestrator.train.pretrained import Pretrained


def load_start(
    start: StartFrom | None,
    pretrained: Pretrained | None,
    config: TrainConfig,
    manifest: Manifest,
    net: ShardedNet,
    optimizer: PaperSGD,
    schedule: ReduceLROnPlateau,
    average: WeightAverage | None = None,
) -> checkpoints.State:
    """Load the run's last checkpoint; else another run's, under this run's settings; else return a new state, with the
    weights of the trained net that the run starts from, if there is one.

    Raises ValueError for what does not fit, and for a checkpoint that was damaged.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as path:
            _verify(Path(path))
            return checkpoints.load(Path(path), net, optimizer, schedule, average)
    if start is None:
        if pretrained is not None:
            pretrained.load_weights(net, manifest.classes, config.num_classes or len(manifest.classes))
            if average is not None:
                average.restart()
        return checkpoints.State()
    with StoragePath(start.checkpoint).as_local_dir() as path:
        _verify(path)
        state = checkpoints.load(path, net, optimizer, schedule, average)
    checkpoints.scale_rate(config.lr / start.lr, optimizer, schedule)
    return state


def _verify(folder: Path) -> None:
    """Compare a checkpoint with its record, once on every node."""
    if ray.train.get_context().get_local_rank() == 0:
        record.verify(folder)
