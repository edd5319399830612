r"""Resampling that gradients can follow, each at its own price.

The plain gradient of a filter holds the resampled indices fixed: low in noise, and biased, since
it does not see that other particles would have been chosen.

| resampler | log Z_hat is a bound | gradient |
|---|---|---|
| multinomial and the like | yes | plain: without the term for the choice |
| the same, FIVO(score_function=True) | yes | of E[log Z_hat], without bias; noisy |
| StopGradient | yes, the same numbers | of Z_hat, without bias; that of its log is consistent for the score of the model, in K |
| Soft | yes | the part of the choice that the weights make up for; bias falls as ``share`` falls |
| Transport | no: particles are averages of particles | of what it computes, exactly; the value is biased, by the regularisation and in 1 / K |

Sources: Scibior and Wood (2021), https://arxiv.org/abs/2106.10314 (stop-gradient); Karkus et al.
(2018), https://arxiv.org/abs/1805.08975, eq. 3 (soft); Corenflos et al. (2021),
https://arxiv.org/abs/2102.07850, algorithm 3 (transport).
"""  # noqa: E501 - table

import math
from typing import Any

import torch
from torch import Tensor

from inference.protocols import at_least, counts, of_kind
from inference.resampling import RESAMPLERS, Resampler, pick


class StopGradient:
    """Resample as another does, and keep weights of value 1 that remember who was chosen by what.

    Args:
        base: a name of ``RESAMPLERS`` or a function.
    """

    def __init__(self, base: str | Resampler = "multinomial") -> None:
        self.base = pick("base", base, RESAMPLERS)

    def __call__(self, log_weight: Tensor) -> Tensor:
        """Indices ``(K, B)``."""
        return self.base(log_weight)

    def fresh(self, log_weight: Tensor, parents: Tensor) -> Tensor:
        """Log-weights ``(K, B)`` after resampling: zeros with a gradient."""
        return (log_weight - log_weight.detach()).gather(0, parents)


class Soft:
    """Resample from a mixture of the weights and the uniform distribution, and weigh by the rest.

    Args:
        share: of the weights in the mixture, in (0, 1]; 1 is multinomial resampling.
        base: as for :class:`StopGradient`.

    Raises:
        ValueError: a share out of range.
    """

    def __init__(self, share: float = 0.5, base: str | Resampler = "multinomial") -> None:
        at_least(0.0, share=share)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {share}")
        self.share, self.base = share, pick("base", base, RESAMPLERS)

    def _mixture(self, log_weight: Tensor) -> Tensor:
        uniform = (1.0 - self.share) / len(log_weight)
        return (self.share * log_weight.exp() + uniform).log()

    def __call__(self, log_weight: Tensor) -> Tensor:
        """Indices ``(K, B)``."""
        return self.base(self._mixture(log_weight))

    def fresh(self, log_weight: Tensor, parents: Tensor) -> Tensor:
        """Log-weights ``(K, B)`` after resampling, 1 on average."""
        return (log_weight - self._mixture(log_weight)).gather(0, parents)


class Transport:
    """Move particles to an equally weighted cloud by entropy-regularised optimal transport.

    New particles are averages of old ones, by weights that sum to 1; that old ones give as much as
    they weigh holds up to a few percent, which more iterations make smaller.

    Every tensor of the state is averaged, so a state of anything but real coordinates is out of
    place. For ``particle_filter`` alone: no particle has a single parent.

    Args:
        regularisation: of the entropy, in units of the mean squared distance of particles.
        iterations: of Sinkhorn's algorithm, the first ones at a larger regularisation.

    Raises:
        ValueError: a regularisation that is not positive, or no iterations.
    """

    def __init__(self, regularisation: float = 0.05, iterations: int = 100) -> None:
        at_least(0.0, regularisation=regularisation)
        if not regularisation:
            raise ValueError("regularisation must be positive, got 0")
        counts(1, iterations=iterations)
        self.regularisation, self.iterations = regularisation, iterations

    def __call__(self, log_weight: Tensor) -> Tensor:
        """Refuse: nothing is chosen."""
        raise NotImplementedError(
            "Transport averages particles, so none has one parent; use it in particle_filter, "
            "whose log_evidence is differentiable"
        )

    def move(self, state: Any, log_weight: Tensor, due: Tensor) -> Any:
        """The state ``(K, B, ...)`` of particles of equal weight, where ``due`` ``(B,)``."""
        flat = [tensor.reshape(*tensor.shape[:2], -1) for tensor in state]
        for tensor in flat:
            if not tensor.is_floating_point():
                raise NotImplementedError(
                    f"Transport averages states of real numbers, got {tensor.dtype}"
                )
        plan = self.plan(torch.cat(flat, dim=-1), log_weight)  # (B, new, old)
        moved = []
        for tensor, rows in zip(state, flat, strict=True):
            new = torch.einsum("bij,jbd->ibd", plan * len(log_weight), rows).view_as(tensor)
            moved.append(torch.where(due.view(1, -1, *[1] * (tensor.ndim - 2)), new, tensor))
        return type(state)(*moved)

    def plan(self, particles: Tensor, log_weight: Tensor) -> Tensor:
        """How much of each old particle goes to each new one, ``(B, K, K)``, all of it 1.

        Args:
            particles: ``(K, B, D)``.
            log_weight: normalised, ``(K, B)``.
        """
        of_kind(Tensor, "log-weights (K, B)", log_weight=log_weight)
        count = len(particles)
        at = particles.transpose(0, 1)  # (B, K, D)
        cost = (at.unsqueeze(2) - at.unsqueeze(1)).square().sum(dim=-1)
        cost = cost / cost.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        old = log_weight.t().unsqueeze(1)  # (B, 1, K)
        f, entropy = at.new_zeros(len(at), count, 1), 1.0
        for i in range(self.iterations):
            before, entropy = entropy, max(self.regularisation, 0.75**i)  # from blunt to sharp
            f, kernel = f * (before / entropy), -cost / entropy
            g = old - (kernel + f).logsumexp(dim=1, keepdim=True)
            f = -math.log(count) - (kernel + g).logsumexp(dim=2, keepdim=True)
        return (kernel + f + g).exp()
