"""Settings that name layers of the net: which are frozen, and which learn at another rate."""

import math

from alexnet.presets import preset_of

_NET = preset_of("paper")  # all presets have layers of these names
GROUPS = {
    "conv": tuple(layer.name for layer in _NET.convs),
    "fc": tuple(layer.name for layer in _NET.fully_connected),
}
LAYERS = GROUPS["conv"] + GROUPS["fc"]  # first to last
NONE = "none"


def frozen_layers(text: str) -> tuple[str, ...]:
    """The layers that a `freeze` such as conv1,conv2 names, first to last.

    Raises ValueError, without the field's name, for other names, and if nothing would be left to train.
    """
    named = {layer for name in _parts(text) for layer in _layers_of(name)}
    if len(named) == len(LAYERS):
        raise ValueError("nothing would be left to train; leave out at least one layer, such as fc8")
    return tuple(layer for layer in LAYERS if layer in named)


def rate_factors(text: str) -> dict[str, float]:
    """The factor of each name in an `lr_factor` such as conv=0.1,fc8=10: groups first, then layers, first to last.

    Raises ValueError, without the field's name, for anything else.
    """
    found: dict[str, float] = {}
    for part in _parts(text):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"{part}: expected a layer and its factor, such as conv=0.1,fc8=10")
        _layers_of(name)
        try:
            factor = float(number)
        except ValueError:
            raise ValueError(f"{part}: expected a number, such as {name}=0.1") from None
        if factor == 0:
            raise ValueError(f"{part}: a factor is above 0; to keep a layer as it is, freeze it: --freeze {name}")
        if not 0 < factor < math.inf:
            raise ValueError(f"{part}: a factor is a number above 0, such as {name}=0.1")
        if name in found:
            raise ValueError(f"{name} is there twice; leave one out")
        found[name] = factor
    return {name: found[name] for name in (*GROUPS, *LAYERS) if name in found}


def canonical_freeze(text: str) -> str:
    """The one way to write a `freeze`. Raises ValueError as `frozen_layers` does."""
    return ",".join(frozen_layers(text)) or NONE


def canonical_factors(text: str) -> str:
    """The one way to write an `lr_factor`. Raises ValueError as `rate_factors` does."""
    return ",".join(f"{name}={factor!r}".removesuffix(".0") for name, factor in rate_factors(text).items()) or NONE


def layer_factors(freeze: str, lr_factor: str) -> dict[str, float]:
    """The factor of every layer that is trained, first to last: its own, else its group's, else 1.

    Raises ValueError of one line for a factor that no layer has, because those that it names are frozen.
    """
    frozen, factors = frozen_layers(freeze), rate_factors(lr_factor)
    for name in factors:
        if all(layer in frozen for layer in _layers_of(name)):
            raise ValueError(f"lr_factor = {lr_factor!r}: {name} is frozen; leave it out there, or out of freeze")
    group_of = {layer: group for group, layers in GROUPS.items() for layer in layers}
    return {layer: factors.get(layer, factors.get(group_of[layer], 1.0)) for layer in LAYERS if layer not in frozen}


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip() not in ("", NONE)]


def _layers_of(name: str) -> tuple[str, ...]:
    """A layer, or those of a group. Raises ValueError."""
    if name in LAYERS:
        return (name,)
    if name not in GROUPS:
        raise ValueError(f"no layer {name!r}; there are {', '.join(LAYERS)}, and conv and fc for all of a kind")
    return GROUPS[name]
