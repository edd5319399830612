"""Disentangled sequential auto-encoder (DSAE): a global f and local z_t.

Source: Li and Mandt (2018), https://arxiv.org/abs/1803.02991.

Departures: the paper's two encoders are a :class:`GlobalGuide` around a local guide. The
"factorised" one, q(z_t | x_t), wraps :class:`~pyro_avrnn.guides.MeanFieldGuide`. The "full" one,
q(z_{1:T} | x_{1:T}, f), wraps :class:`~pyro_avrnn.guides.FilteringGuide` with an encoder in both
directions; f enters after its recurrent network (with the state), not before.
"""

from typing import Any, NamedTuple

import pyro.distributions as dist
from torch import Size, Tensor, nn

from pyro_avrnn.networks import Cell, NormalNetwork, RecurrentEncoder, diagonal_normal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.shapes import agree, broadcast_cat, width


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

    Raises:
        ValueError: a model without such a latent, or a local guide of another model.
    """

    def __init__(
        self,
        model: SequenceModel,
        local: SequenceGuide,
        *,
        rnn_dim: int = 64,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__(model)
        if not model.f_dim:
            raise ValueError(
                "a GlobalGuide proposes a latent that all steps share, but "
                f"{type(model).__name__} has none (f_dim 0); use {type(local).__name__} by itself"
            )
        model.require_own(local)
        self.local, self.smoothing = local, True  # f has read all of x
        self.reader = RecurrentEncoder(model.c_dim, rnn_dim, "both")
        self.head = NormalNetwork(self.reader.out_dim, model.f_dim, (), min_scale=min_scale)

    def proposal_f(self, x: Tensor, mask: Tensor) -> dist.Distribution:
        """q(f | x_{1:T}), batch ``(B,)``, event shape ``(F,)``."""
        return self.head(self.reader.summary(self.features(x), mask))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """c of the local guide, ``(B, T, C)``."""
        return self.local.encode(x, mask)

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | ...) of the local guide."""
        return self.local.proposal(state, c_t)
