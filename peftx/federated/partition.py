"""Splits a dataset among clients, for studies: by label, unevenly."""

from collections.abc import Sequence

import numpy as np


def dirichlet_partition(
    labels: Sequence[int], clients: int, alpha: float = 0.5, *, seed: int = 0, min_size: int = 1
) -> list[list[int]]:
    """Indices of the samples of each client: of every class, client k gets a share p_k with p ~ Dirichlet(alpha, ...).

    The usual label skew (arXiv:1909.06335); FedSVD's experiments use alpha 0.5 and 6 clients. Every sample goes to
    exactly one client, in ascending order. Draws that leave a client with fewer than `min_size` are made again.

    Args:
        labels: class of each sample.
        clients: how many parts.
        alpha: > 0; the smaller, the more skewed.
        seed: of a private generator.
        min_size: samples that each client has at least.

    Raises:
        ValueError: settings out of range, or 1,000 draws without success.
    """
    if clients < 1 or not alpha > 0:
        raise ValueError(f"clients must be at least 1 and alpha positive, got {clients} and {alpha}")
    if len(labels) < clients * min_size:
        raise ValueError(f"{len(labels)} samples are too few for {clients} clients with at least {min_size} each")
    generator = np.random.default_rng(seed)
    known = np.asarray(labels)
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in np.unique(known):
            members = generator.permutation(np.flatnonzero(known == label))
            shares = generator.dirichlet(np.full(clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, chunk in zip(parts, np.split(members, cuts), strict=True):
                part.extend(chunk.tolist())
        if min(map(len, parts)) >= min_size:
            return [sorted(part) for part in parts]
    raise ValueError(f"no draw of 1,000 gave each client {min_size} samples: raise alpha or lower min_size")
