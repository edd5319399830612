"""Disentangled sequential auto-encoder (DSAE): a global f and local z_t.

Source: Li and Mandt (2018), https://arxiv.org/abs/1803.02991.

Departures: the paper's two encoders are a :class:`GlobalGuide` around a local guide. The
"factorised" one, q(z_t | x_t), wraps :class:`~pyro_avrnn.guides.MeanFieldGuide`. The "full" one,
q(z_{1:T} | x_{1:T}, f), wraps :class:`~pyro_avrnn.guides.FilteringGuide` with an encoder in both
directions; f enters after its recurrent network (with the state), not before.
"""

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_avrnn.networks import Cell, NormalNetwork, RecurrentEncoder, diagonal_normal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.shapes import agree, broadcast_cat, width

_LEAST_DEVIATION = 0.1  # of a feature along a sequence, in units of the data


class DSAEState(NamedTuple):
    """What crosses from step t to t + 1."""

    memory: Tensor  # the cell's, of z_{<t}, (*batch, M); its output is h_t
    f: Tensor  # the same at every step, (*batch, F)


class DSAE(SequenceModel):
    r"""DSAE: :math:`p(f) \prod_t p(z_t \mid z_{<t})\,p(x_t \mid z_t, f)`.

    Args:
        x_dim: X, size of an observation.
        z_dim: Z, size of a local latent.
        f_dim: F, size of the latent that all steps share.
        prior: maps ``h_t`` (*batch, H) to a distribution over ``z_t``.
        decoder: maps ``(z_t, f)`` to a distribution over ``x_t``, event shape (X,).
        cell: advances its memory by one step on ``phi(z_t)``.
        encode_x, encode_z: the feature maps phi, owned by the model; a guide borrows the first.
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        f_dim: int,
        *,
        prior: nn.Module,
        decoder: nn.Module,
        cell: Cell,
        encode_x: nn.Module,
        encode_z: nn.Module,
    ) -> None:
        super().__init__(x_dim, z_dim, f_dim=f_dim, decoder=decoder, encode_x=encode_x)
        agree("z", model=z_dim, prior=width("z_dim", prior), encode_z=width("in_dim", encode_z))
        agree("h", cell=cell.h_dim, prior=width("h_dim", prior))
        agree("phi(z)", cell=cell.in_dim, encode_z=width("out_dim", encode_z))
        agree("z and f together", decoder=width("in_dim", decoder), model=z_dim + f_dim)
        self.prior, self.decoder, self.cell = prior, decoder, cell
        self.encode_x, self.encode_z = encode_x, encode_z

    def prior_f(self, batch_shape: Size) -> dist.Distribution:
        """p(f) = N(0, I), event shape ``(F,)``."""
        zeros = self.cell.initial(batch_shape).new_zeros(*batch_shape, self.f_dim)
        return diagonal_normal(zeros, zeros + 1.0)

    def init(self, batch_shape: Size) -> DSAEState:
        """Zeros; ``condition`` puts f in."""
        memory = self.cell.initial(batch_shape)
        return DSAEState(memory, memory.new_zeros(*batch_shape, self.f_dim))

    def condition(self, state: DSAEState, f: Tensor) -> DSAEState:
        """The state with this f."""
        return DSAEState(state.memory, f)

    def transition(self, state: DSAEState) -> dist.Distribution:
        """p(z_t | z_{<t}), event shape ``(Z,)``."""
        return self.prior(self.cell.output(state.memory))

    def emission(self, z_t: Tensor, state: DSAEState) -> dist.Distribution:
        """p(x_t | z_t, f), event shape ``(X,)``."""
        return self.decoder(z_t, state.f)

    def advance(self, state: DSAEState, z_t: Tensor, x_t: Tensor) -> DSAEState:
        """h_{t+1} = g(phi(z_t), h_t); f stays."""
        return DSAEState(self.cell(self.encode_z(z_t), state.memory), state.f)

    def hidden(self, state: DSAEState) -> Tensor:
        """h_t and f, ``(*batch, H + F)``."""
        return broadcast_cat(self.cell.output(state.memory), state.f)

    def features(self, x: Tensor) -> Tensor:
        """phi(x), ``(*batch, C)``."""
        return self.encode_x(x)


class GlobalGuide(SequenceGuide):
    """Guide q(f | x_{1:T}) q(z_{1:T} | x, f): a network for f around any guide for z.

    Args:
        model: a model with a latent f that all steps share.
        local: the guide that proposes z; the state it may read contains f.
        rnn_dim: width of the network that reads the sequence, in each direction.
        min_scale: floor of the scale of q(f).
        normalise: show the local guide every feature of x less its mean over the sequence, in
            units of its deviation there, so that what is constant along a sequence is harder to
            read for z.
        segment: in training, show the network of f a random piece of each sequence, with its
            steps in random order: a share between these two. What the order of steps says cannot
            enter f. None shows all, in order; so does evaluation.

    Raises:
        ValueError: a model without such a latent, a local guide of another model, or a segment
            that is no two shares in order.
    """

    def __init__(
        self,
        model: SequenceModel,
        local: SequenceGuide,
        *,
        rnn_dim: int = 64,
        min_scale: float = 1e-3,
        normalise: bool = False,
        segment: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(model)
        if segment is not None and not (
            isinstance(segment, list | tuple)
            and len(segment) == 2
            and 0.0 < segment[0] <= segment[1] <= 1.0
        ):
            raise ValueError(
                "segment must be two shares of a sequence in order, such as (0.3, 0.7), got "
                f"{segment!r}"
            )
        if not model.f_dim:
            raise ValueError(
                "a GlobalGuide proposes a latent that all steps share, but "
                f"{type(model).__name__} has none (f_dim 0); use {type(local).__name__} by itself"
            )
        model.require_own(local)
        self.local, self.smoothing = local, True  # f has read all of x
        self.normalise, self.segment = normalise, segment
        self.reader = RecurrentEncoder(model.c_dim, rnn_dim, "both")
        self.head = NormalNetwork(self.reader.out_dim, model.f_dim, (), min_scale=min_scale)

    def proposal_f(self, x: Tensor, mask: Tensor) -> dist.Distribution:
        """q(f | x_{1:T}), batch ``(B,)``, event shape ``(F,)``."""
        if self.segment is not None and self.training:
            x, mask = shuffled_segments(x, mask, *self.segment)
        return self.head(self.reader.summary(self.features(x), mask))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """c of the local guide, ``(B, T, C)``."""
        return self.local.encode(normalised(x, mask) if self.normalise else x, mask)

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | ...) of the local guide."""
        return self.local.proposal(state, c_t)


def normalised(x: Tensor, mask: Tensor) -> Tensor:
    """x ``(B, T, X)`` less its mean over the steps of its sequence, over its deviation there.

    A deviation far below 1, which standardised data have over all sequences, is not blown up.
    """
    seen = mask.unsqueeze(-1).to(x)
    count = seen.sum(dim=1, keepdim=True).clamp(min=1.0)
    centred = (x - (x * seen).sum(dim=1, keepdim=True) / count) * seen
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred / (variance + _LEAST_DEVIATION**2).sqrt()


def shuffled_segments(x: Tensor, mask: Tensor, least: float, most: float) -> tuple[Tensor, Tensor]:
    """A random stretch of each sequence, its steps in random order.

    Args:
        x, mask: ``(B, T, X)`` and the prefix ``(B, T)``.
        least, most: shares of a sequence, between which that of the stretch is drawn.

    Returns:
        The same shapes; the steps of a stretch come first, the rest is padding.
    """
    length = mask.sum(dim=1, keepdim=True)
    share = least + (most - least) * torch.rand_like(length, dtype=x.dtype)
    count = (share * length).ceil().long().clamp(min=1)
    start = (torch.rand_like(share) * (length - count + 1)).long()
    steps = torch.arange(mask.shape[1], device=x.device)
    outside = (steps < start) | (steps >= start + count)
    order = torch.rand(mask.shape, dtype=x.dtype, device=x.device).masked_fill(outside, 2.0)
    chosen = order.argsort(dim=1).unsqueeze(-1).expand_as(x)
    return x.gather(1, chosen), steps < count
