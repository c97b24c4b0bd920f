"""Where a worker's net starts from: its run's last checkpoint, another run's, or nothing."""

from pathlib import Path

import ray.train
from torch.optim.lr_scheduler import ReduceLROnPlateau

from alexnet import PaperSGD
from alexnet.layouts import ShardedNet
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.train import checkpoints
from orchestrator.train.messages import StartFrom


def load_start(
    start: StartFrom | None, config: TrainConfig, net: ShardedNet, optimizer: PaperSGD, schedule: ReduceLROnPlateau
) -> checkpoints.State:
    """Load the run's last checkpoint; else another run's weights under this run's settings; else return a new state.

    Raises ValueError for a checkpoint that does not fit.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as path:
            return checkpoints.load(Path(path), net, optimizer, schedule)
    if start is None:
        return checkpoints.State()
    with StoragePath(start.checkpoint).as_local_dir() as path:
        state = checkpoints.load(path, net, optimizer, schedule)
    checkpoints.scale_rate(config.lr / start.lr, optimizer, schedule)
    return state
