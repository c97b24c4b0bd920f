"""The nets that can be built by name, one description a file."""

from .caffe import CAFFE
from .description import LRN, Preset
from .paper import PAPER
from .torchvision import TORCHVISION

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (PAPER, CAFFE, TORCHVISION)}

__all__ = ["LRN", "PRESETS", "Preset", "preset_of"]


def preset_of(name: str) -> Preset:
    """The preset of this name. Raises ValueError for another."""
    if name not in PRESETS:
        raise ValueError(f"preset = {name!r}: unknown; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
