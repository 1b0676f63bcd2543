"""Rank correlation and the Frechet distance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["frechet_distance", "spearman"]

Floats = NDArray[np.float64]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of two lists of numbers, -1 to 1; equal numbers share the mean of their ranks.

    0 if one of the lists is constant, because a constant output does not follow the request. Raises ValueError for
    lists of different lengths or with fewer than two numbers.
    """
    a, b = _ranks(x), _ranks(y)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} numbers: two lists of the same length, from 2")
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def _ranks(values: ArrayLike) -> Floats:
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[place]
    return ranks


def frechet_distance(first: ArrayLike, second: ArrayLike) -> float:
    """Frechet distance of two sets of features [n, d], modelled as Gaussians (Heusel et al. 2017), 0 or more.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2). Raises ValueError for fewer than two samples or different widths.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features {list(a.shape)} and {list(b.shape)}: [n, d] with the same d and n from 2")
    covariance, other = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # tr (C1 C2)^1/2 is computed from the symmetric C1^1/2 C2 C1^1/2, which has the same eigenvalues as C1 C2.
    root = _square_root(covariance)
    between = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other @ root), 0, None)).sum()
    means = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return max(0.0, float(means + np.trace(covariance) + np.trace(other) - 2 * between))


def _square_root(symmetric: Floats) -> Floats:
    values, vectors = np.linalg.eigh(symmetric)
    root: Floats = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
