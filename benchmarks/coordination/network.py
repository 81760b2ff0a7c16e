"""What the exchange among ranks takes: a model of latency and bandwidth, not a measurement."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from benchmarks.coordination.draws import NUM_RANKS, Row


class Network(NamedTuple):
    """Constants of an alpha-beta model. Assumptions, not measurements.

    Launch and hops of the NCCL classes: NCCL 2.2x, src/graph/tuning.cc, protocol LL (small messages), which takes
    base 6.6 us, NVLink 0.6 us and network 2.7 us a hop of a ring. TCP: 30 us a hop, as of a socket's round trip.
    Bandwidths: of the link, one way, halved for LL, which sends a flag with every word.
    """

    name: str
    launch: float
    """Seconds that any collective takes to begin."""
    hop: float
    """Seconds from rank to rank on different nodes (or, on a single node, within it)."""
    hop_within: float
    bandwidth: float
    """Bytes a second and rank, one way."""
    ranks_per_node: int
    most_ranks: int = 1024


NETWORKS = [
    Network("NVLink 4 (one domain)", 6.6e-6, 0.6e-6, 0.6e-6, 450e9 / 2, 64, most_ranks=64),
    Network("InfiniBand NDR, 8 GPUs a node", 6.6e-6, 2.7e-6, 0.6e-6, 50e9 / 2, 8),
    Network("25 GbE over TCP, 1 GPU a node", 20e-6, 30e-6, 30e-6, 3.1e9, 1),
]


def ring_seconds(network: Network, W: int, num_bytes: int) -> float:
    """All-gather of `num_bytes` per rank: W - 1 hops, each carrying one rank's bytes."""
    across = max(0, W // network.ranks_per_node - 1)
    hops = across * network.hop + (W - 1 - across) * network.hop_within
    return network.launch + hops + (W - 1) * num_bytes / network.bandwidth


def tree_seconds(network: Network, W: int, num_bytes: int) -> float:
    """The same by recursive doubling, log2 W hops: what NCCL's PAT and MPI come near to, not what a ring does."""
    within = math.log2(min(W, network.ranks_per_node))
    hops = within * network.hop_within + (math.log2(W) - within) * network.hop
    return network.launch + hops + (W - 1) * num_bytes / network.bandwidth


def model_transport() -> list[Row]:
    """`scores`: 4 bytes a sample. `thresholds`: 8 a quantile (Q = 16), and the total's all-reduce, twice the hops."""
    rows: list[Row] = []
    for network in NETWORKS:
        for W in (W for W in NUM_RANKS if network.most_ranks >= W):
            # The total: one float32, reduced and spread, always by a tree.
            total = 2 * tree_seconds(network, W, 4) - network.launch
            for algorithm, seconds in (("ring", ring_seconds), ("tree", tree_seconds)):
                row = partial(_transport_row, network, algorithm, W)
                rows += [row("scores", B, 4 * B, seconds(network, W, 4 * B), 0.0) for B in (32, 64, 256, 1024)]
                rows.append(row("thresholds", 0, 128, seconds(network, W, 128), total))
    return rows


def _transport_row(
    network: Network, algorithm: str, W: int, transport: str, B: int, num_bytes: int, exposed: float, hidden: float
) -> Row:
    keys: Row = {"network": network.name, "algorithm": algorithm, "W": W, "transport": transport, "B": B or "any"}
    return keys | {
        "bytes_given_per_rank": num_bytes,
        # On a ring each rank passes on all blocks but its successor's; by doubling it sends 1, 2, 4, ... W / 2 of them.
        "bytes_sent_per_rank": num_bytes * (W - 1),
        "exposed_microseconds": exposed * 1e6,
        "hidden_microseconds": hidden * 1e6,
    }
