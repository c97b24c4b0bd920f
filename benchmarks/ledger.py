"""What does a worker send in a training step of the full net, and how long does that take?

    python benchmarks/ledger.py

Prints the table of docs/layouts.md: nothing is measured here, the bytes come from the shapes (alexnet.cost) and the
times from the links' rates (orchestrator.cluster.layout_choice.LINKS). A test checks the bytes against sockets.
"""

from collections.abc import Iterator

from alexnet.cost import communication, estimate
from alexnet.layouts import Layout
from orchestrator.cluster.layout_choice import LINKS

NET = {"num_classes": 1000, "input_size": 224, "width": 1.0}
SHOWN = ("PCIe 3.0 x16", "NVLink 3", "100 GbE", "10 GbE")


def table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| workers | batch | layout | memory | sent | " + " | ".join(SHOWN) + " |"
    yield "|---:|---:|---|---:|---:|" + "---:|" * len(SHOWN)
    for workers in (2, 4, 8, 16, 32, 64):
        for batch in (128, 512, 4096):
            for kind in ("data", "columns", "hybrid"):
                layout = Layout(kind, workers)
                sent = sum(e.size_bytes for e in communication(layout, **NET, global_batch_size=batch))
                memory = estimate(**NET, global_batch_size=batch, layout=layout).memory_bytes
                times = " | ".join(f"{1000 * sent / LINKS[link]:,.1f} ms" for link in SHOWN)
                yield f"| {workers} | {batch} | {kind} | {memory / 1e9:.2f} GB | {sent / 1e6:,.0f} MB | {times} |"


if __name__ == "__main__":
    print("\n".join(table()))
