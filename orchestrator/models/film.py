"""The first layer's kernels at each epoch whose weights a run kept, and as a film."""

import io
import re
import warnings
from typing import Any

import numpy as np
import PIL.Image
import safetensors.numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import SafetensorError

from alexnet import explain_pictures
from alexnet.trained import WEIGHTS
from orchestrator.base.storage import StoragePath
from orchestrator.models.find import FoundModel

KEPT = re.compile(r"(?:checkpoint|kept)-epoch-(\d+)(?:-step-\d+)?")
FRAME_MS, LAST_FRAME_MS = 700, 2500
DPI = 110
LAYER = "conv1.weight"


def folder_of(found: FoundModel) -> StoragePath:
    """Where a model's run keeps weights; of a search's model, its best trial. Raises ValueError if it has no run."""
    if found.kept is None:
        raise ValueError("--film: takes a run, and this model is not in the folder of one")
    return found.kept


def kernels_by_epoch(run: StoragePath) -> dict[str, NDArray[np.float32]]:
    """The kernels (C, 3, H, W) of each epoch that the run kept weights of, the earliest first.

    Raises ValueError of one line for weights that cannot be read, or where there is one epoch or none.
    """
    found: dict[str, StoragePath] = {}
    folders = [name for name, is_folder in run.children().items() if is_folder and KEPT.fullmatch(name)]
    for name in sorted(folders, key=lambda name: name.split("-epoch-")[1]):  # of one epoch, either will do
        if (run / name / WEIGHTS).size() is not None:
            found[_moment(name)] = run / name / WEIGHTS
    if len(found) < 2:
        has = f"only {next(iter(found))}" if found else "none"
        raise ValueError(f"--film: takes the weights of two epochs or more, and {run} has kept {has}")
    kernels = {moment: _kernels(file) for moment, file in found.items()}
    if len({each.shape for each in kernels.values()}) > 1:
        raise ValueError(f"--film: the weights that {run} has kept are of several nets")
    return kernels


def film(kernels: dict[str, NDArray[np.float32]], columns: int, title: str) -> bytes:
    """An animated PNG of a frame for each epoch. A kernel's brightest weight is its largest of all epochs."""
    scale = np.max([np.abs(each).max(axis=(1, 2, 3)) for each in kernels.values()], axis=0)
    frames = []
    for moment, each in kernels.items():
        data = png(explain_pictures.kernels(each, columns, f"{title}, {moment}", scale))
        frames.append(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    out = io.BytesIO()
    pauses = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:], duration=pauses, loop=0)
    return out.getvalue()


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG, the same whenever it is drawn."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a foreign name: a box stands for it
        figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def _moment(name: str) -> str:
    epoch, _, step = name.split("-epoch-")[1].partition("-step-")
    return f"epoch {int(epoch)}" + (f", step {int(step)}" if step else "")


def _kernels(file: StoragePath) -> NDArray[np.float32]:
    """Of a local file, only the kernels are read."""
    found: Any = None
    try:
        if file.local is None:
            found = safetensors.numpy.load(file.read()).get(LAYER)
        else:
            with safetensors.safe_open(str(file.local), "np") as weights:
                found = weights.get_tensor(LAYER) if LAYER in weights.keys() else None  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{file}: is not a whole safetensors file ({str(error).splitlines()[0]:.100})") from None
    if found is None or found.ndim != 4 or found.shape[1] != 3:
        raise ValueError(f"{file}: has no {LAYER} of kernels that read three colours")
    kernels: NDArray[np.float32] = found.astype(np.float32)
    return kernels
