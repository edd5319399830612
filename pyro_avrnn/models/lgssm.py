r"""Linear-Gaussian state space model, and the guides that are exact for it.

Source: Kalman (1960), https://doi.org/10.1115/1.3662552; Särkkä (2013), "Bayesian Filtering and
Smoothing", sections 4.3 and 8.2. Here every bound has a closed form: with :class:`ExactSmoother`
as guide the log-weights of any draw sum to :math:`\log p(x_{1:T})`.

The guides carry a likelihood of z as information :math:`(\eta, \Lambda)`, meaning
:math:`\exp(\eta^\top z - z^\top \Lambda z / 2)` up to a factor without z. No covariance is
inverted: with :math:`z = m + L u` and :math:`u \sim N(0, I)`, only :math:`I + L^\top \Lambda L` is
factored, whose eigenvalues are at least one. The largest one sets the loss by rounding: an
emission a thousand times sharper than the transition loses six digits of sixteen.
"""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_avrnn.sequence import SequenceGuide, SequenceModel


class LGSSMState(NamedTuple):
    """What crosses from step t to t + 1: the distribution of z_t given the past."""

    mean: Tensor  # (*batch, Z)
    scale_tril: Tensor  # (*batch, Z, Z), Cholesky factor of the covariance


class Information(NamedTuple):
    """A likelihood of z: log = vector . z - z . matrix z / 2, up to a constant."""

    vector: Tensor  # (*batch, Z)
    matrix: Tensor  # (*batch, Z, Z), positive semi-definite


class LGSSM(SequenceModel):
    r"""LGSSM: :math:`z_t \sim N(A z_{t-1}, Q)`, :math:`x_t \sim N(C z_t, R)`, z_1 ~ N(m_1, S_1).

    All six arguments become parameters. A ``scale_tril`` is a Cholesky factor, which is a standard
    deviation where Z or X is 1. Training does not keep its diagonal positive; entries above the
    diagonal stay 0.

    Args:
        transition_matrix: A, ``(Z, Z)``.
        transition_scale_tril: lower-triangular factor of Q, ``(Z, Z)``.
        emission_matrix: C, ``(X, Z)``.
        emission_scale_tril: lower-triangular factor of R, ``(X, X)``.
        initial_mean: m_1, ``(Z,)``.
        initial_scale_tril: lower-triangular factor of S_1, ``(Z, Z)``.

    Raises:
        ValueError: a shape that does not fit, a factor that is not lower triangular with a
            positive diagonal, or numbers that are not finite.
        TypeError: anything but tensors of floating point numbers of one dtype.

    Example:
        >>> model = LGSSM.scalar(a=0.9, q=0.7, r=0.5, s0=1.3)
        >>> d = model.rollout(ExactSmoother(model), torch.zeros(2, 5, 1), num_particles=3)
        >>> d.log_weight.sum(0).shape  # log p(x) for every particle (3) and sequence (2)
        torch.Size([3, 2])
    """

    def __init__(
        self,
        transition_matrix: Tensor,
        transition_scale_tril: Tensor,
        emission_matrix: Tensor,
        emission_scale_tril: Tensor,
        initial_mean: Tensor,
        initial_scale_tril: Tensor,
    ) -> None:
        x, z = _sizes(emission_matrix)
        super().__init__(x_dim=x, z_dim=z)

        def own(name: str, value: Tensor, *shape: int) -> nn.Parameter:
            return nn.Parameter(_checked(name, value, shape, emission_matrix.dtype))

        self.transition_matrix = own("transition_matrix", transition_matrix, z, z)
        self.transition_scale_tril = own("transition_scale_tril", transition_scale_tril, z, z)
        self.emission_matrix = own("emission_matrix", emission_matrix, x, z)
        self.emission_scale_tril = own("emission_scale_tril", emission_scale_tril, x, x)
        self.initial_mean = own("initial_mean", initial_mean, z)
        self.initial_scale_tril = own("initial_scale_tril", initial_scale_tril, z, z)

    @classmethod
    def scalar(cls, a: float = 0.9, q: float = 0.7, r: float = 0.5, s0: float = 1.3) -> "LGSSM":
        """X = Z = 1: z_1 ~ N(0, s0^2), z_t ~ N(a z_{t-1}, q^2), x_t ~ N(z_t, r^2).

        Args:
            a: factor of z_{t-1} in the mean of z_t.
            q, r, s0: standard deviations (not variances) of transition, emission and z_1.
        """
        a_, q_, r_, s0_ = (torch.tensor([[float(value)]]) for value in (a, q, r, s0))
        return cls(a_, q_, torch.ones(1, 1), r_, torch.zeros(1), s0_)

    @classmethod
    def random(cls, z_dim: int, x_dim: int, seed: int) -> "LGSSM":
        """A random stable model, the same for the same seed; A has spectral radius 0.9."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def scale_tril(size: int) -> Tensor:
            diagonal = 0.5 + torch.rand(size, generator=generator)
            return (0.3 * normal(size, size)).tril(-1) + torch.diag(diagonal)

        transition = normal(z_dim, z_dim)
        transition = 0.9 * transition / torch.linalg.eigvals(transition).abs().max()
        parts = transition, scale_tril(z_dim), normal(x_dim, z_dim), scale_tril(x_dim)
        return cls(*parts, normal(z_dim), scale_tril(z_dim))

    def init(self, batch_shape: Size) -> LGSSMState:
        """The distribution of z_1: m_1 and the factor of S_1."""
        return LGSSMState(
            self.initial_mean.expand(*batch_shape, -1),
            self.initial_scale_tril.tril().expand(*batch_shape, -1, -1),
        )

    def transition(self, state: LGSSMState) -> dist.Distribution:
        """p(z_t | z_{t-1}), event shape ``(Z,)``."""
        return _normal(state.mean, state.scale_tril)

    def emission(self, z_t: Tensor, state: LGSSMState) -> dist.Distribution:
        """p(x_t | z_t), event shape ``(X,)``."""
        return _normal(z_t @ self.emission_matrix.mT, self.emission_scale_tril.tril())

    def advance(self, state: LGSSMState, z_t: Tensor, x_t: Tensor) -> LGSSMState:
        """The distribution of z_{t+1}: A z_t and the factor of Q."""
        return LGSSMState(
            z_t @ self.transition_matrix.mT,
            self.transition_scale_tril.tril().expand(*z_t.shape[:-1], -1, -1),
        )

    def hidden(self, state: LGSSMState) -> Tensor:
        """The mean of z_t given the past, ``(*batch, Z)``."""
        return state.mean

    def information(self, x_t: Tensor) -> Information:
        """p(x_t | z_t) as a likelihood of z_t.

        Args:
            x_t: ``(*batch, X)``.
        """
        factor = self.emission_scale_tril.tril()
        whitened = torch.linalg.solve_triangular(factor, self.emission_matrix, upper=False)
        x_white = torch.linalg.solve_triangular(factor, x_t.unsqueeze(-1), upper=False)  # X, 1
        matrix = whitened.mT @ whitened
        return Information(
            (whitened.mT @ x_white).squeeze(-1), matrix.expand(*x_t.shape[:-1], -1, -1)
        )

    def information_before(self, after: Information) -> Information:
        """Turn a likelihood of z_{t+1} into one of z_t by integrating out the transition's noise.

        Joseph's form, a sum of squares, keeps the matrix positive semi-definite under rounding.
        """
        factor, matrix = self.transition_scale_tril.tril(), after.matrix
        eye = torch.eye(self.z_dim, dtype=factor.dtype, device=factor.device)
        root = torch.linalg.cholesky(eye + factor.mT @ matrix @ factor)
        gain = torch.cholesky_solve(factor.mT @ matrix, root).mT  # matrix L (I + L' matrix L)^-1
        keep = eye - gain @ factor.mT
        kept = keep @ matrix @ keep.mT + gain @ gain.mT  # (matrix^-1 + Q)^-1
        back = self.transition_matrix
        vector = back.mT @ keep @ after.vector.unsqueeze(-1)
        return Information(vector.squeeze(-1), back.mT @ kept @ back)


class _ExactGuide(SequenceGuide):
    """Base: the distribution of z_t given the past times a likelihood that ``encode`` packs in c.

    Args:
        model: lends its parameters through bound methods; the guide has none.
    """

    def __init__(self, model: LGSSM) -> None:
        if not isinstance(model, LGSSM):
            raise TypeError(
                f"model must be an LGSSM for an exact guide, got {type(model).__name__}"
            )
        super().__init__(model)
        self.information, self.information_before = model.information, model.information_before

    def observed(self, x: Tensor, mask: Tensor) -> Information:
        """The likelihood of each step alone, ``(B, T, ...)``; zeros, a flat one, on padding."""
        vector, matrix = self.information(x)
        vector = torch.where(mask[..., None], vector, 0.0)
        return Information(vector, torch.where(mask[..., None, None], matrix, 0.0))

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        """q(z_t | z_{t-1}, c_t), event shape ``(Z,)``; the model's transition where c_t is 0."""
        vector, matrix = c_t[..., : self.z_dim], c_t[..., self.z_dim :]
        matrix = matrix.unflatten(-1, (self.z_dim, self.z_dim))
        mean, factor = state.mean.unsqueeze(-1), state.scale_tril
        eye = torch.eye(self.z_dim, dtype=factor.dtype, device=factor.device)
        precision = eye + factor.mT @ matrix @ factor
        # flipped, the factor is upper: precision = U U', and L U'^-1 is again lower triangular
        upper = torch.linalg.cholesky(precision.flip(-2, -1)).flip(-2, -1)
        scale_tril = factor @ torch.linalg.solve_triangular(upper.mT, eye, upper=False)
        pull = vector.unsqueeze(-1) - matrix @ mean  # the likelihood's gradient at the mean
        return _normal((mean + scale_tril @ (scale_tril.mT @ pull)).squeeze(-1), scale_tril)


class ExactFilter(_ExactGuide):
    """Exact q = p(z_t | z_{t-1}, x_t): the locally optimal proposal of a particle filter.

    Source: Doucet et al. (2000), https://doi.org/10.1023/A:1008935410038 (the
    "optimal importance function").
    """

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """c_t: p(x_t | z_t) as information, ``(B, T, Z + Z * Z)``."""
        return _packed(self.observed(x, mask))


class ExactSmoother(_ExactGuide):
    """Exact q = p(z_t | z_{t-1}, x_{t:T}): the factors of the posterior.

    Every bound is then tight for any draw: the log-weight of a step depends on the draws, the sum
    over all steps does not.
    """

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """c_t: p(x_{t:T} | z_t) as information, ``(B, T, Z + Z * Z)``."""
        own = self.observed(x, mask)
        message = Information(*(part[:, -1] for part in own))
        messages = [message]
        for t in range(x.shape[1] - 2, -1, -1):
            # a message from padding is zero, so a sequence starts at its own last step
            vector, matrix = self.information_before(message)
            message = Information(own.vector[:, t] + vector, own.matrix[:, t] + matrix)
            messages.append(message)
        vectors, matrices = zip(*reversed(messages), strict=True)
        return _packed(Information(torch.stack(vectors, dim=1), torch.stack(matrices, dim=1)))


def _packed(information: Information) -> Tensor:
    return torch.cat([information.vector, information.matrix.flatten(-2)], dim=-1)


def _normal(mean: Tensor, scale_tril: Tensor) -> dist.Distribution:
    return dist.MultivariateNormal(mean, scale_tril=scale_tril, validate_args=False)


def _sizes(emission_matrix: Tensor) -> tuple[int, ...]:
    """X and Z, read off the emission matrix."""
    kind = getattr(emission_matrix, "dtype", type(emission_matrix).__name__)
    if not isinstance(emission_matrix, Tensor) or not emission_matrix.is_floating_point():
        raise TypeError(f"emission_matrix must be a tensor of floating point numbers, got {kind}")
    shape = tuple(emission_matrix.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"emission_matrix must have shape (X, Z), both at least 1, got {shape}")
    return shape


def _checked(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A copy of an argument, after checking its type, shape and values."""
    kind = getattr(value, "dtype", type(value).__name__)
    if kind != dtype:
        raise TypeError(f"{name} must be a tensor of {dtype} as emission_matrix is, got {kind}")
    if value.shape != shape:
        fit = "to fit emission_matrix (X, Z)"
        raise ValueError(f"{name} must have shape {shape} {fit}, got {tuple(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got {value.tolist()}")
    if name.endswith("tril") and not constraints.lower_cholesky.check(value):
        raise ValueError(
            f"{name} must be lower triangular with a positive diagonal, got {value.tolist()}; "
            "torch.linalg.cholesky(covariance) is"
        )
    return value.detach().clone()
