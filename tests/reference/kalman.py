"""Kalman filter and Rauch-Tung-Striebel smoother in numpy, for one sequence at a time.

Source: Särkkä (2013), "Bayesian Filtering and Smoothing", theorems 4.2 and 8.2. The model is
z_1 ~ N(m, S), z_t ~ N(A z_{t-1}, Q), x_t ~ N(C z_t, R); Q, R and S are covariances, and every
function takes ``(x, A, Q, C, R, m, S)`` with x of shape (T, X). Nothing of the library is used.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray


class Moments(NamedTuple):
    mean: ndarray  # (T, Z)
    cov: ndarray  # (T, Z, Z)


class Filtered(NamedTuple):
    log_evidence: float  # log p(x_{1:T}), nats
    predicted: Moments  # z_t given x_{1:t-1}
    filtered: Moments  # z_t given x_{1:t}


def kalman_filter(
    x: ndarray, A: ndarray, Q: ndarray, C: ndarray, R: ndarray, m: ndarray, S: ndarray
) -> Filtered:
    log_evidence, predicted, filtered = 0.0, [], []
    for t, x_t in enumerate(x):
        if t > 0:
            m, S = A @ m, A @ S @ A.T + Q
        predicted.append((m, S))
        innovation, cov = x_t - C @ m, C @ S @ C.T + R
        gain = np.linalg.solve(cov, C @ S).T
        _, log_det = np.linalg.slogdet(2.0 * np.pi * cov)
        log_evidence -= 0.5 * (log_det + innovation @ np.linalg.solve(cov, innovation))
        keep = np.eye(len(m)) - gain @ C
        m, S = m + gain @ innovation, keep @ S @ keep.T + gain @ R @ gain.T
        filtered.append((m, S))
    return Filtered(float(log_evidence), _stack(predicted, len(m)), _stack(filtered, len(m)))


def log_evidence(
    x: ndarray, A: ndarray, Q: ndarray, C: ndarray, R: ndarray, m: ndarray, S: ndarray
) -> float:
    return kalman_filter(x, A, Q, C, R, m, S).log_evidence


def smooth(
    x: ndarray, A: ndarray, Q: ndarray, C: ndarray, R: ndarray, m: ndarray, S: ndarray
) -> Moments:
    """z_t given all of x."""
    _, predicted, filtered = kalman_filter(x, A, Q, C, R, m, S)
    mean, cov = filtered.mean[-1], filtered.cov[-1]
    smoothed = [(mean, cov)]
    for t in range(len(x) - 2, -1, -1):
        gain = np.linalg.solve(predicted.cov[t + 1], A @ filtered.cov[t]).T
        mean = filtered.mean[t] + gain @ (mean - predicted.mean[t + 1])
        cov = filtered.cov[t] + gain @ (cov - predicted.cov[t + 1]) @ gain.T
        smoothed.append((mean, cov))
    return _stack(smoothed[::-1], len(m))


def _stack(moments: list[tuple[ndarray, ndarray]], size: int) -> Moments:
    means, covs = [mean for mean, _ in moments], [cov for _, cov in moments]
    # the shapes in full, so that a sequence of no steps has moments too
    return Moments(np.reshape(means, (-1, size)), np.reshape(covs, (-1, size, size)))
