"""The nets that can be built by name, one description a file."""

from .description import LRN, Preset
from .paper import PAPER

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (PAPER,)}

__all__ = ["LRN", "PRESETS", "Preset", "preset_of"]


def preset_of(name: str) -> Preset:
    """The preset of this name. Raises ValueError for another."""
    if name not in PRESETS:
        raise ValueError(f"preset = {name!r}: unknown; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
