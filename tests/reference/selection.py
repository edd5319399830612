r"""Density of "draw S, keep one in proportion to exp r" by quadrature, and evidences with it.

With :math:`1 / a = \int_0^\infty e^{-u a} du` the expectation over the S - 1 others is a power,

.. math:: E \frac{S a}{a + \sum_i b_i} = S a \int_0^\infty e^{-u a} \big(E e^{-u b}\big)^{S-1} du.
"""

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(500)
_LOG_U = 0.5 * (_NODES + 1.0) * 100.0 - 45.0  # u from exp(-45) to exp(55)


def density(base: np.ndarray, log_ratio: np.ndarray, step: float, candidates: int) -> np.ndarray:
    """The density of the kept draw on a grid.

    Args:
        base: density of a draw on the grid, ``(..., G)``.
        log_ratio: r on the grid, ``(..., G)``.
        step: distance between points of the grid.
        candidates: S.
    """
    u, weight = np.exp(_LOG_U), 0.5 * 100.0 * _WEIGHTS * np.exp(_LOG_U)
    kept = np.zeros_like(base)
    odds = np.exp(log_ratio)
    for node, mass in zip(u, weight, strict=True):
        decay = np.exp(-node * odds)
        others = (base * decay).sum(axis=-1, keepdims=True) * step
        kept += mass * candidates * odds * decay * others ** (candidates - 1)
    return base * kept


def log_evidence(
    start: np.ndarray, transition: np.ndarray, likelihood: np.ndarray, step: float
) -> float:
    """log p(x_1..x_T) of a chain on a grid.

    Args:
        start: density of z_1, ``(G,)``.
        transition: density of z_t at the column given z_{t-1} at the row, ``(G, G)``.
        likelihood: p(x_t | z_t), ``(T, G)``.
        step: distance between points of the grid.
    """
    total, ahead = 0.0, start
    for row in likelihood:
        joint = ahead * row
        mass = joint.sum() * step
        total += np.log(mass)
        ahead = (joint / mass) @ transition * step
    return float(total)
