"""What each worker of a layout holds of a net: which layers are sharded, and which then need an exchange.

    single    one worker holds the net
    data      every worker holds the net and trains on its own images; gradients are summed
    columns   two workers hold a column each, half of every layer's maps, and train on the same images (paper, 3.5)
    hybrid    every worker holds the convolutions for its own images, and its share of the fully connected layers'
              units for all images (Krizhevsky 2014, arXiv 1404.5997)

The workers that together hold one net are a group of consecutive ranks; several groups train in data parallel.
"""

from dataclasses import dataclass

from torch import nn

from .presets import Preset

KINDS = ("single", "data", "columns", "hybrid")
COLUMNS = 2  # of the nets that the layout of this name splits


@dataclass(frozen=True)
class Layout:
    """A kind of partition for a number of workers. Raises ValueError where they do not match."""

    kind: str
    workers: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layout = {self.kind!r}: unknown; choose one of {', '.join(KINDS)}")
        if self.kind == "single" and self.workers != 1:
            raise ValueError(f"workers = {self.workers}: layout single has one; choose data, columns or hybrid")
        if self.workers < 1 or self.workers % self.group_size:
            raise ValueError(
                f"workers = {self.workers}: layout {self.kind} needs a multiple of {self.group_size}, one worker "
                "per column; or choose another layout, such as data"
            )

    @property
    def group_size(self) -> int:
        """Workers that together hold one net."""
        return {"columns": COLUMNS, "hybrid": self.workers}.get(self.kind, 1)

    @property
    def replicas(self) -> int:
        """Copies of the net."""
        return self.workers // self.group_size

    def group_of(self, rank: int) -> range:
        """The ranks that together hold a net with this one."""
        first = rank - rank % self.group_size
        return range(first, first + self.group_size)


def possible(preset: Preset) -> tuple[str, ...]:
    """The kinds of layout that a net can have."""
    return tuple(kind for kind in KINDS if _obstacle(preset, kind) is None)


def _obstacle(preset: Preset, kind: str) -> str | None:
    """What keeps a net from a kind of layout."""
    if kind == "columns" and preset.columns != COLUMNS:
        return "has one column" if preset.columns == 1 else f"has {preset.columns} columns, not {COLUMNS}"
    if kind == "columns" and preset.lrn_reads == "all columns" and preset.has_lrn:
        return "has LRN across its columns"
    if kind == "hybrid" and len(preset.fully_connected) < 2:
        return "has one fully connected layer"
    return None


class Partition:
    """A net under a layout. Raises ValueError of one line for a layout that the net cannot have."""

    def __init__(self, preset: Preset, layout: Layout) -> None:
        if obstacle := _obstacle(preset, layout.kind):
            others = sorted(possible(preset))
            raise ValueError(
                f"layout = {layout.kind}: preset {preset.name} {obstacle}; choose "
                f"{', '.join(others[:-1])} or {others[-1]}"
            )
        self.preset, self.layout = preset, layout
        fully_connected = tuple(layer.name for layer in preset.fully_connected)
        convs = tuple(conv.name for conv in preset.convs)
        held = {"columns": convs + fully_connected, "hybrid": fully_connected} if layout.group_size > 1 else {}
        self.sharded = held.get(layout.kind, ())  # layers of which a worker holds only a part, in order

    @property
    def gathers_maps(self) -> tuple[str, ...]:
        """The layers before which the workers gather the maps or units of which each has its own."""
        found = []
        for before, layer in zip(self.preset.layers, self.preset.layers[1:], strict=False):
            reads_all = getattr(layer, "reads", "all columns") == "all columns"
            if before.name in self.sharded and reads_all and layer != self.preset.head:
                found.append(layer.name)
        return tuple(found)

    @property
    def gathers_rows(self) -> str | None:
        """The layer before which the workers gather the features of which each has its own images'."""
        is_hybrid = self.layout.kind == "hybrid" and self.layout.group_size > 1
        return self.preset.fully_connected[0].name if is_hybrid else None

    def is_sharded(self, name: str) -> bool:
        """Whether a worker holds only a part of this parameter."""
        return name.split(".")[0] in self.sharded and name != f"{self.preset.head.name}.bias"

    def shard_dim(self, name: str) -> int:
        """The dimension along which a sharded parameter is split: inputs for the last layer, outputs for the others."""
        return 1 if name == f"{self.preset.head.name}.weight" else 0

    def check(self, net: nn.Module) -> None:
        """Raises ValueError where a layer of the net cannot be split equally."""
        size = self.layout.group_size
        for name, param in net.named_parameters():
            if self.is_sharded(name) and param.shape[self.shard_dim(name)] % size:
                raise ValueError(
                    f"workers = {self.layout.workers}: {name.split('.')[0]} has {param.shape[self.shard_dim(name)]} "
                    f"units, which {size} workers of layout {self.layout.kind} cannot share equally"
                )
