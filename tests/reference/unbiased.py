"""Is an estimate of the evidence unbiased? The average of Z_hat / Z must be 1."""

import math

from torch import Tensor

LARGEST_SHARE = 0.02  # of the sum of all ratios, that one ratio may have


def deviation(log_z_hat: Tensor, log_z: Tensor | float) -> float:
    """How many standard errors the average of Z_hat / Z is from 1.

    Infinite where one ratio is a large share of the sum: it carries the average and the standard
    error alike, so that their quotient stays near 1 however large it is.

    Args:
        log_z_hat: independent estimates, shape ``(n,)``.
        log_z: exact, of each estimate or of all.
    """
    ratio = (log_z_hat - log_z).exp()
    if ratio.max() > LARGEST_SHARE * ratio.sum():
        return math.inf
    return float((ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio))))
