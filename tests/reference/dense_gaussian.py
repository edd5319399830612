"""A linear-Gaussian state space model as one multivariate normal: no recursion to get wrong.

The model is z_1 ~ N(m, S), z_t ~ N(A z_{t-1}, Q), x_t ~ N(C z_t, R), all covariances. With w the
independent noises, z = G (m, 0, .., 0) + G w where block (s, t) of G is A^(s - t) for s >= t.
Nothing of the library is used, and nothing of ``kalman.py``.
"""

import numpy as np
from numpy import ndarray
from scipy import linalg


def joint(
    length: int, A: ndarray, Q: ndarray, C: ndarray, R: ndarray, m: ndarray, S: ndarray
) -> tuple[ndarray, ndarray]:
    """Mean and covariance of (z_1, .., z_T, x_1, .., x_T), size T (Z + X)."""
    size = len(m)
    powers = np.zeros((length, size, length, size))
    for s in range(length):
        for t in range(s + 1):
            powers[s, :, t] = np.linalg.matrix_power(A, s - t)
    G = powers.reshape(length * size, length * size)
    start = np.concatenate([m, np.zeros((length - 1) * size)])
    z_mean = G @ start
    z_cov = G @ linalg.block_diag(S, *[Q] * (length - 1)) @ G.T
    read = np.kron(np.eye(length), C)
    noise = np.kron(np.eye(length), R)
    cross = z_cov @ read.T
    cov = np.block([[z_cov, cross], [cross.T, read @ cross + noise]])
    return np.concatenate([z_mean, read @ z_mean]), cov


def condition(
    mean: ndarray, cov: ndarray, known: ndarray, values: ndarray
) -> tuple[ndarray, ndarray]:
    """Mean and covariance of the other entries, given those at the indices ``known``."""
    other = np.setdiff1d(np.arange(len(mean)), known)
    gain = linalg.solve(cov[np.ix_(known, known)], cov[np.ix_(known, other)], assume_a="pos").T
    new_mean = mean[other] + gain @ (values - mean[known])
    return new_mean, cov[np.ix_(other, other)] - gain @ cov[np.ix_(known, other)]


def log_density(values: ndarray, mean: ndarray, cov: ndarray) -> float:
    """By Cholesky: scipy.stats drops small eigenvalues."""
    root = linalg.cholesky(cov, lower=True)
    white = linalg.solve_triangular(root, values - mean, lower=True)
    log_det = 2.0 * np.log(np.diag(root)).sum()
    return float(-0.5 * (white @ white + log_det + len(mean) * np.log(2.0 * np.pi)))


def log_joint(z: ndarray, x: ndarray, *model: ndarray) -> float:
    """log p(z_{1:T}, x_{1:T}), nats; z (T, Z), x (T, X)."""
    mean, cov = joint(len(x), *model)
    return log_density(np.concatenate([z.ravel(), x.ravel()]), mean, cov)


def log_evidence(x: ndarray, *model: ndarray) -> float:
    """log p(x_{1:T}), nats; x (T, X)."""
    mean, cov = joint(len(x), *model)
    return log_density(x.ravel(), mean[-x.size :], cov[-x.size :, -x.size :])


def posterior(x: ndarray, *model: ndarray) -> tuple[ndarray, ndarray]:
    """Mean (T, Z) of z given x, and covariance (T, Z, T, Z)."""
    mean, cov = joint(len(x), *model)
    size = len(mean) - x.size
    z_mean, z_cov = condition(mean, cov, np.arange(size, len(mean)), x.ravel())
    return z_mean.reshape(len(x), -1), z_cov.reshape(len(x), size // len(x), len(x), -1)
