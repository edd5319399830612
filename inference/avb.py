r"""Guides that only sample: adversarial variational Bayes.

The KL of such a guide has no density to be computed from. A critic that tells its codes from those
of a known r(z | h, c) estimates :math:`T = \log q - \log r`, and stands in the bound:

.. math:: E_q\big[\log p(x_t \mid z_t, h_t) + \log p(z_t \mid h_t) - \log r(z_t) - T(z_t)\big].

With the exact T this is the ELBO, and so is its gradient (that of T in q's parameters vanishes on
average). A critic that lags behind makes the value too high or too low: it bounds nothing. Score
the model with an explicit guide that is fitted to it afterwards, or with the bootstrap filter.

Source: Mescheder et al. (2017), https://arxiv.org/abs/1701.04722, eq. 3.3 for T, section 4 for
adaptive contrast.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.adversarial import Adversarial
from inference.densities import StepDensities
from inference.objectives import ELBO
from inference.protocols import Program, of_kind
from inference.traces import step_densities


@dataclass(kw_only=True)
class AVB(ELBO):
    """Negative evidence lower bound, log q estimated by a critic.

    Args (and those of :class:`ELBO`):
        critic: ``Adversarial(critic, role="ratio")``, whose ``update`` is a hook of ``fit``; role
            "ratio_to_prior" takes the prior for r, as published without adaptive contrast.

    Raises:
        TypeError, ValueError: no critic, or one of another role.
    """

    critic: Adversarial

    def __post_init__(self) -> None:
        super().__post_init__()
        of_kind(Adversarial, 'Adversarial(critic, role="ratio")', critic=self.critic)
        if self.critic.role.log_ratio is None:
            raise ValueError(
                f"critic must have the role ratio or ratio_to_prior for AVB, got "
                f"{self.critic.role.name!r}"
            )

    def draw(self, model: Program, guide: Program, *args: Any, **given: Any) -> StepDensities:
        """Densities of every step, ``(T, K, B)``; that of the guide is an estimate."""
        given = {"num_particles": self.num_particles, **self.options, **given}
        given.pop("recompute", None)  # densities are computed here, from all states
        d = step_densities(model, guide, *args, **given, scored=False)
        program: Any = model
        emission = program.emission(d.z, d.states)

        def seen(values: Tensor) -> Tensor:
            return torch.where(d.mask, values, 0.0)

        log_prior, log_proposal = self.critic.log_ratio(d)
        return d._replace(
            emission=emission,
            log_emission=seen(emission.log_prob(d.x)),
            log_prior=seen(log_prior),
            log_proposal=seen(log_proposal),
        )
