"""How fast a card is: round figures, from which the cost of a step is estimated."""

from __future__ import annotations

from dataclasses import dataclass

# What of these figures a training step gets. They put costs in proportion; candidates are ranked, nothing is promised.
USED = 0.45
# Seconds to launch the kernels of one block, forward and backward. A server's: what an H100's machine took for Swin-T, within a
# third (profiling/results/nvidia-h100-80gb-hbm3/throughput.jsonl). A desktop's, whose cores are some three times as fast,
# is not measured.
SERVER, DESKTOP = 4.1e-3, 1.4e-3


@dataclass(frozen=True)
class Card:
    """A card's figures.

    Attributes:
        name: a part of what CUDA calls it.
        flops: dense 16-bit matrix products with fp32 accumulation, FLOP/s.
        bandwidth: of its memory, bytes/s.
        bus: of its host bus, bytes/s one way.
        launching: seconds that its host takes to launch the kernels of one block, forward and backward.
    """

    name: str
    flops: float
    bandwidth: float
    bus: float
    launching: float = DESKTOP


# 16-bit tensor-core FLOP/s, memory bandwidth and PCIe (about 80 % of its raw rate): round figures, none measured by us.
CARDS: tuple[Card, ...] = (
    Card("GTX 1660", 10e12, 192e9, 12e9),
    Card("RTX 2060", 52e12, 336e9, 12e9),
    Card("RTX 3050", 36e12, 224e9, 12e9),
    Card("RTX 3060", 51e12, 360e9, 24e9),
    Card("RTX 3090", 71e12, 936e9, 24e9),
    Card("RTX 4060", 60e12, 272e9, 12e9),
    Card("RTX 4090", 165e12, 1008e9, 24e9),
    Card("RTX 5090", 210e12, 1790e9, 48e9),
    Card("T4", 65e12, 320e9, 12e9),
    Card("L4", 121e12, 300e9, 24e9),
    Card("A10", 125e12, 600e9, 24e9),
    Card("A100", 312e12, 1555e9, 24e9, SERVER),
    Card("H100", 800e12, 3000e9, 48e9, SERVER),
    Card("H200", 800e12, 4800e9, 48e9, SERVER),
)
NOMINAL = Card("a small card", 50e12, 300e9, 12e9)


def card_named(name: str) -> Card:
    """The card in the table whose name is a part of ``name``, or `NOMINAL`."""
    found = [card for card in CARDS if card.name.lower() in name.lower()]
    return max(found, key=lambda card: len(card.name)) if found else NOMINAL
