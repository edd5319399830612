r"""A prior refined by a critic: draw candidates, keep one with probability proportional to exp r.

A critic that tells a guide's codes from those of a prior p(z | h) estimates
:math:`r(z, h) = \log q(z \mid h) - \log p(z \mid h)`: it knows where the prior is wrong. The
refined prior draws S candidates from p and keeps candidate i with a probability proportional to
:math:`e^{r(z_i, h)}`. Its density is

.. math:: \tilde p(z \mid h) = p(z \mid h)\, E\Big[\frac{S\, e^{r(z, h)}}
   {e^{r(z, h)} + \sum_{i=2}^S e^{r(z_i, h)}}\Big], \qquad z_2, \dots, z_S \sim p(\cdot \mid h).

Proof: by symmetry it is S times the density of "the first candidate is z and is kept". One draw of
the expectation is an unbiased estimate of it. The logarithm of an unbiased estimate is too low on
average (Jensen), so ELBO, IWAE and FIVO computed with it remain lower bounds of the evidence of
the very model that ``sample`` draws from. As S grows it tends to p exp(r) over its normaliser; at
most log S nats can be gained a step.

Sources: Azadi et al. (2019), https://arxiv.org/abs/1810.06758 (a critic that selects draws);
Lawson et al. (2019), https://arxiv.org/abs/1910.14265, section 3 (the density of a selected draw);
Aneja et al. (2021), https://arxiv.org/abs/2010.02917 (a prior refined by noise contrast).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from inference.protocols import counts
from pyro_avrnn.critics import LogRatio
from pyro_avrnn.shapes import agree, width
from pyro_avrnn.units import Units, units_of

_AT_ONCE = 2**18  # candidates that the critic reads at once, times the distributions
_FIXED: ContextVar[bool] = ContextVar("fixed candidates", default=False)


@contextmanager
def fixed_candidates() -> Iterator[None]:
    """Show all densities of refined priors the same candidates inside, at all steps and states.

    Densities are then numbers that two ways of computing must agree on, not estimates: bounds
    computed inside are none.
    """
    token = _FIXED.set(True)
    try:
        yield
    finally:
        _FIXED.reset(token)


class Refined(dist.TorchDistribution):
    """Of S draws of a base one, chosen in proportion to exp r; event shape ``(Z,)``.

    ``log_prob`` is an estimate: its exponential is unbiased. Its S - 1 candidates are drawn at
    the first call and kept, so that a second call with the same value gives the same number.

    ``sample`` is not differentiable, as the choice has no gradient that a draw could follow.

    Args:
        base: a normal, a mixture of normals, or a flow, of batch shape ``*batch``.
        critic: maps u ``(*shape, *batch, Z)`` and h to r ``(*shape, *batch)``.
        h: what base and critic depend on, ``(*batch, H)``.
        num_candidates: S.
        candidates: u of the S - 1 others, ``(S - 1, *batch, Z)``; drawn where they are None.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        base: dist.Distribution,
        critic: Callable[[Tensor, Tensor], Tensor],
        h: Tensor,
        num_candidates: int,
        candidates: Tensor | None = None,
    ) -> None:
        self.base, self.critic, self.h, self.num_candidates = base, critic, h, num_candidates
        self._candidates = candidates
        self._units: Units | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the base prior."""
        return self.base.support

    @property
    def units(self) -> Units:
        """Units of the base prior."""
        if self._units is None:
            self._units = units_of(self.base)
        return self._units

    @property
    def candidates(self) -> Tensor:
        """u of the other candidates, ``(S - 1, *batch, Z)``."""
        if _FIXED.get():
            codes = torch.arange((self.num_candidates - 1) * self.event_shape[0]).to(self.h).cos()
            shape = (self.num_candidates - 1, *(1,) * len(self.batch_shape), -1)
            return codes.reshape(shape).expand(-1, *self.batch_shape, -1)
        if self._candidates is None:
            self._candidates = self.units.draw(Size((self.num_candidates - 1,)))
        return self._candidates

    def among(self, candidates: Tensor) -> "Refined":
        """The same distribution with candidates drawn before, ``(S - 1, *batch, Z)``."""
        return type(self)(self.base, self.critic, self.h, self.num_candidates, candidates)

    def expand(self, batch_shape: Sequence[int], _instance: "Refined | None" = None) -> "Refined":
        """The same distribution with a larger batch shape, and candidates of its own."""
        base = self.base.expand(Size(batch_shape))
        return type(self)(base, self.critic, self.h, self.num_candidates)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of an unbiased estimate of the density, nats, ``(*shape, *batch)``."""
        own, others = self.critic(self.units.read(value), self.h), self.log_ratios
        for _ in range(own.ndim + 1 - others.ndim):
            others = others.unsqueeze(1)
        others = others.expand(len(others), *own.shape)
        total = torch.cat([own.unsqueeze(0), others]).logsumexp(dim=0)
        log_share = own - total + math.log(self.num_candidates)
        return self.base.log_prob(value) + log_share

    @property
    def log_ratios(self) -> Tensor:
        """r of the other candidates, ``(S - 1, *batch)``."""
        rows = self.candidates.shape[1:-1].numel()
        pieces = self.candidates.split(max(_AT_ONCE // max(rows, 1), 1))
        return torch.cat([self.critic(piece, self.h) for piece in pieces])

    def effective_candidates(self, value: Tensor) -> Tensor:
        """1 / (sum of the squared chances of a value and the other candidates), in [1, S]."""
        own, others = self.critic(self.units.read(value), self.h), self.log_ratios
        shares = torch.cat([own.unsqueeze(0), others]).log_softmax(dim=0)
        return (-(2 * shares).logsumexp(dim=0)).exp()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch, Z)``, with candidates of their own."""
        with torch.no_grad():
            u = self.units.draw(Size((self.num_candidates, *sample_shape)))
            log_ratio = self.critic(u, self.h)
            # the largest of r + Gumbel noise is at i with probability proportional to exp r_i
            noisy = log_ratio - torch.empty_like(log_ratio).exponential_().log()
            index = noisy.argmax(dim=0, keepdim=True).unsqueeze(-1)
            return self.units.write(u.gather(0, index.expand(1, *u.shape[1:])).squeeze(0))

    def codes(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the critic is trained on: u of draws of the base, u of a value, and h."""
        return (
            self.units.draw(Size(value.shape[: value.ndim - 1 - len(self.batch_shape)])),
            self.units.read(value),
            self.h,
        )

    @property
    def mean(self) -> Tensor:
        """Refuse with a NotImplementedError: only draws tell it."""
        raise NotImplementedError(
            "a refined prior does not know its mean; average draws, or ask its base"
        )


class RefinedPrior(nn.Module):
    """Prior p(z_t | h) that draws S candidates from a base prior and keeps one, by a critic.

    The critic is no parameter of the model: SVI leaves it alone, and the hook that trains it,
    ``Adversarial(prior.critic, role="refine")``, moves nothing else. It is stored with the model.

    Args:
        base: the prior of candidates; its parameters learn by SVI as before.
        critic: r(u, h), such as :class:`LogRatio`, of u in units of the base; None makes one.
        num_candidates: S, at least 2; evaluation may use more, by setting the attribute.

    Raises:
        ValueError: fewer than 2 candidates, or a critic of other sizes.
    """

    def __init__(
        self, base: nn.Module, critic: nn.Module | None = None, num_candidates: int = 16
    ) -> None:
        super().__init__()
        counts(2, "; a choice needs two", num_candidates=num_candidates)
        self.h_dim, self.z_dim = width("h_dim", base), width("z_dim", base)
        if critic is None:
            if self.h_dim is None or self.z_dim is None:
                raise ValueError(
                    f"critic must be given where the base, a {type(base).__name__}, does not "
                    "state its h_dim and z_dim; give LogRatio(z_dim, h_dim)"
                )
            critic = LogRatio(self.z_dim, self.h_dim)
        agree("z", base=self.z_dim, critic=width("z_dim", critic))
        agree("h", base=self.h_dim, critic=width("h_dim", critic))
        self.base, self.critic, self.num_candidates = base, critic, num_candidates
        self.h_dim = width("h_dim", critic) if self.h_dim is None else self.h_dim
        self.critic.requires_grad_(False)
        self.critic.eval()

    def train(self, mode: bool = True) -> "RefinedPrior":
        """Set the mode of the base; the critic is in training mode only while it learns."""
        super().train(mode)
        self.critic.eval()
        return self

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        return Refined(self.base(h), self.critic, h, self.num_candidates)
