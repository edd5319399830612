"""The contract: a sequence model is four pure functions, a guide is two; Pyro is derived here.

All Pyro sites of the library are stated in this file, once. Sites are ``z_1 .. z_T`` and
``x_1 .. x_T`` inside the plate ``sequences`` (dimension -1), t counted from 1 as in the papers.

A model whose steps share a latent f states its size, ``f_dim``, and writes two more functions:
``prior_f``, and ``condition``, which puts f into the state; its guide writes ``proposal_f``. The
site ``f`` comes before the loop; its densities are counted with step 1.
"""

from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.utils.weak import WeakIdKeyDictionary

from inference.densities import StepDensities, check_batch, check_mask
from inference.protocols import counts
from pyro_avrnn.rollout import Request, Select, rollout
from pyro_avrnn.shapes import agree, broadcast_cat, width


class SequenceModel(nn.Module):
    r"""A sequence model :math:`\prod_t p(z_t \mid s_t)\,p(x_t \mid z_t, s_t)`.

    The state :math:`s_t` summarises all steps before t. A subclass writes ``init``,
    ``transition``, ``emission`` and ``advance``, none with a side effect, each broadcasting
    over leading dimensions. The instance is then a Pyro program: ``model(x, mask)``.

    Args:
        x_dim: X, size of an observation.
        z_dim: Z, size of a latent; 0 for a model without latents.
        f_dim: F, size of a latent that all steps share; 0 for a model without one.
        decoder: the network of the emission, if any; its support decides which data can be scored.
        encode_x: the network that reads x, if any; it must read X features.
    """

    support: constraints.Constraint = constraints.real
    expects: str = "finite real numbers"
    padding: float = 0.0  # a value of the support that padded steps are overwritten with
    features_go_on: bool = False  # whether ``features`` reads steps before t

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        f_dim: int = 0,
        decoder: nn.Module | None = None,
        encode_x: nn.Module | None = None,
    ) -> None:
        super().__init__()
        counts(1, x_dim=x_dim)
        counts(0, z_dim=z_dim, f_dim=f_dim)
        if f_dim and not z_dim:
            raise ValueError(f"z_dim must be at least 1 with a shared f (f_dim {f_dim}), got 0")
        self.x_dim, self.z_dim, self.f_dim = x_dim, z_dim, f_dim
        scored, read = width("x_dim", decoder), width("in_dim", encode_x)
        agree("x", model=x_dim, decoder=scored, encode_x=read)
        self.support = getattr(decoder, "support", self.support)
        self.expects = getattr(decoder, "expects", self.expects)
        self.padding = getattr(decoder, "padding", self.padding)

    def init(self, batch_shape: Size) -> Any:
        """The state before step 1: a NamedTuple of tensors ``(*batch, ...)``."""
        raise _unwritten(self, "init")

    def transition(self, state: Any) -> dist.Distribution:
        """p(z_t | state), event shape ``(Z,)``."""
        raise _unwritten(self, "transition")

    def emission(self, z_t: Tensor, state: Any) -> dist.Distribution:
        """p(x_t | z_t, state), event shape ``(X,)``."""
        raise _unwritten(self, "emission")

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        """The next state; every tensor of it has the leading dimensions of the old one."""
        raise _unwritten(self, "advance")

    def require_guide(self, guide: Any) -> None:
        """Refuse a guide that was built for another model, whose functions it has borrowed.

        Raises:
            ValueError: a guide of another model, both named with their sizes; or a parameter
                store with values for model or guide that were loaded and not taken.
        """
        self.require_own(guide)
        require_taken("model", self)
        require_taken("guide", guide)

    def require_own(self, guide: Any) -> None:
        """Refuse a guide that was built for another model."""
        other = getattr(getattr(guide, "init", None), "__self__", self)
        if other is not self and isinstance(other, SequenceModel):
            here, there = (
                f"{type(m).__name__} (x_dim {m.x_dim}, z_dim {m.z_dim}, f_dim {m.f_dim})"
                for m in (self, other)
            )
            raise ValueError(
                f"guide {type(guide).__name__} was built for another model, {there}, and does not "
                f"fit this one, {here}; build it with this model"
            )

    def prior_f(self, batch_shape: Size) -> dist.Distribution:
        """p(f), batch shape ``batch_shape``, event shape ``(F,)``; for models with f_dim > 0."""
        raise _unwritten(self, "prior_f, as f_dim is above 0")

    def condition(self, state: Any, f: Tensor) -> Any:
        """The initial state with f ``(*batch, F)`` in it; for models with f_dim > 0."""
        raise _unwritten(self, "condition, as f_dim is above 0")

    def hidden(self, state: Any) -> Tensor:
        """h_t, ``(*batch, H)``: what guides and critics read of a state; all of it by default."""
        return broadcast_cat(*state)

    def features(self, x: Tensor) -> Tensor:
        """Features of observations that the model owns and a guide borrows. Default: x itself.

        Args:
            x: ``(*batch, T, X)``; what is said of step t may depend on steps before t, too. Such
                a model sets ``features_go_on = True``, and its ``features`` takes ``start``, the
                state ``(K, B, ...)`` before step 1 of a series that goes on.

        Returns:
            ``(*batch, T, C)``.
        """
        return x

    @property
    def h_dim(self) -> int:
        """H, width of what ``hidden`` gives."""
        with torch.no_grad():
            return self.hidden(self.init(Size((1,)))).shape[-1]

    @property
    def c_dim(self) -> int:
        """C, width of what ``features`` gives."""
        own = next(self.parameters(), torch.empty(0))
        with torch.no_grad(), torch.random.fork_rng([], enabled=self.training):  # dropout draws
            return self.features(own.new_zeros(1, 1, self.x_dim)).shape[-1]

    def step(self, t: int, state: Any, x_t: Tensor | None = None) -> tuple[Any, Tensor]:
        """Step t of the Pyro program, t from 1; gives the next state and x_t ``(*batch, X)``."""
        if self.z_dim:
            z_t = pyro.sample(f"z_{t}", self.transition(state))
        else:
            z_t = self.hidden(state)[..., :0]
        x_t = pyro.sample(f"x_{t}", self.emission(z_t, state), obs=x_t)
        return self.advance(state, z_t, x_t), x_t

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The Pyro program.

        Args:
            x: observations ``(B, T, X)``, or None to draw them (B and T then come from ``mask``).
            mask: ``(B, T)`` bool, True for the steps a sequence has, a prefix; None for all.

        Returns:
            The observations, ``(*batch, T, X)``.

        Raises:
            ValueError: data the model cannot score, or a mask that does not fit them.
        """
        x, mask = self.check(x, mask)
        _register("model", self)
        size, length = mask.shape
        ragged = None if bool(mask.all()) else mask
        observations = []
        with pyro.plate("sequences", size, dim=-1):
            state = self.init(Size((size,)))
            if self.f_dim:
                with _masked(ragged, 1):
                    state = self.condition(state, pyro.sample("f", self.prior_f(Size((size,)))))
            for t in pyro.markov(range(1, length + 1)):
                with _masked(ragged, t):
                    state, x_t = self.step(t, state, None if x is None else x[:, t - 1])
                observations.append(x_t)
        return torch.stack(observations, dim=-2)

    def rollout(
        self,
        guide: "SequenceGuide",
        x: Tensor,
        mask: Tensor | None = None,
        num_particles: int = 1,
        *,
        z: Tensor | None = None,
        f: Tensor | None = None,
        select: Select | None = None,
        start: Any = None,
        recompute: int | None = None,
        compile: bool = False,
        scored: bool = True,
        distributions: bool = True,
        twist: Any = None,
    ) -> StepDensities:
        """The joint density of model and guide, with time as a batch dimension.

        Args:
            guide: draws the latents, its recurrence run once.
            x: ``(B, T, X)``.
            mask: ``(B, T)`` bool, a prefix, or None.
            num_particles: K draws a sequence.
            z: latents ``(T, K, B, Z)`` to score, or None to draw them; draws consume the random
                numbers that the guide's own loop would.
            f: ``(K, B, F)``, given with ``z`` where the model has a latent that all steps share.
            select: called after each step, returns the particles that go on; see
                :data:`~pyro_avrnn.rollout.Select`. Row t of the result holds them as they were.
            start: the state before step 1, tensors ``(K, B, ...)``, of a series that goes on; a
                latent that all steps share is in it, and was counted before.
            recompute: steps between the states that are kept for the backward pass, which
                computes everything between them a second time; None keeps it all.
            compile: run the recurrence in C; it pays most where steps are small.
            scored: False leaves out all log-densities, and the emission: they are None then.
            distributions: False lets ``compile`` leave out the distributions of all steps, which
                are None then, and compute their log-densities in C as well.
            twist: by which particles are chosen, too, as ``partial(Foresight.of, twist)`` of
                :mod:`inference.twists`.

        Returns:
            Densities, draws, states and distributions, shapes ``(T, K, B, ...)``.

        Raises:
            NotImplementedError: a guide with parameters to learn that is not reparameterised.
            ValueError: a number below 1, a guide of another model, or a tensor of another shape.
        """
        self.require_own(guide)
        x, mask = check_batch(self, x, mask)
        _register("model", self)
        _register("guide", guide)
        how = recompute, compile, scored, distributions
        asked = Request(num_particles, z, f, select, start, *how, twist)
        return rollout(self, guide, x, mask, asked)

    def check(self, x: Tensor | None, mask: Tensor | None) -> tuple[Any, Tensor]:
        """Data and mask in the shapes they must have, padding overwritten by ``padding``.

        Raises:
            ValueError: naming the argument, what was expected and what arrived.
            NotImplementedError: inside a jit trace, which would check its first batch alone.
        """
        if torch.jit.is_tracing():
            raise NotImplementedError(
                f"{type(self).__name__} cannot be traced by torch.jit, as JitTrace_ELBO does: the "
                "trace would take the mask and length of its first batch for those of all; use "
                "ELBO(compile=True), or Trace_ELBO"
            )
        if x is None:
            if mask is None:
                raise ValueError("mask (B, T) is needed to draw x: it gives B and T")
            if isinstance(mask, Tensor) and mask.ndim == 2 and 0 in mask.shape:
                raise ValueError(f"mask must hold a sequence and a step, got {tuple(mask.shape)}")
            return None, check_mask(mask, mask.shape)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of floating point numbers, got {kind}")
        own = next(self.parameters(), x)
        if x.dtype != own.dtype:
            raise TypeError(f"x must be {own.dtype} as the model is, got {x.dtype}; use x.to(...)")
        if x.ndim != 3 or x.shape[-1] != self.x_dim:
            hint = "; add the batch dimension" if x.ndim == 2 else ""
            raise ValueError(f"x must have shape (B, T, {self.x_dim}), got {tuple(x.shape)}{hint}")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"x must hold at least one sequence and one step, got {x.shape}")
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        else:
            mask = check_mask(mask, x.shape[:2])
            x = torch.where(mask.unsqueeze(-1), x, self.padding)
        bad = ~torch.isfinite(x) if self.support is constraints.real else ~self.support.check(x)
        if bool(bad.any()):
            b, t, i = bad.nonzero()[0].tolist()
            raise ValueError(
                f"x must hold {self.expects} for this emission, got {x[b, t, i].item():g} at "
                f"sequence {b}, frame {t}, feature {i} (counted from 0)"
            )
        return x, mask


class SequenceGuide(nn.Module):
    r"""A guide :math:`\prod_t q(z_t \mid s_t, c_t)` that follows a model's state.

    It borrows the model's functions as bound methods, so it registers only its own parameters.
    A subclass writes ``proposal`` and, unless x itself will do, ``encode``.

    Args:
        model: the model whose latents are proposed.
    """

    smoothing: bool = False  # whether c_t depends on x after t: such a guide cannot work online

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.init, self.advance, self.check = model.init, model.advance, model.check
        self.transition, self.hidden, self.features = (
            model.transition,
            model.hidden,
            model.features,
        )
        self.condition = model.condition
        self.z_dim, self.f_dim = model.z_dim, model.f_dim

    def proposal_f(self, x: Tensor, mask: Tensor) -> dist.Distribution:
        """q(f | x_{1:T}), batch ``(B,)``, event shape ``(F,)``; for models with f_dim > 0."""
        raise NotImplementedError(
            f"{type(self).__name__} does not propose the latent f that all steps of this model "
            "share; wrap it in models.GlobalGuide"
        )

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """c, ``(B, T, C)``, computed once per batch of sequences. Default: the model's features.

        Args:
            x: ``(B, T, X)``, padding already overwritten.
            mask: ``(B, T)`` bool.
        """
        return self.features(x)

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | state, c_t), event shape ``(Z,)``."""
        raise _unwritten(self, "proposal")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """The Pyro program; arguments as for the model."""
        if x is None:
            raise ValueError("x (B, T, X) is needed by a guide: it proposes latents given data")
        x, mask = self.check(x, mask)
        _register("guide", self)
        if not self.z_dim:
            return  # no sites, hence no plate either
        c = self.encode(x, mask)
        ragged = None if bool(mask.all()) else mask
        with pyro.plate("sequences", mask.shape[0], dim=-1):
            state = self.init(Size((mask.shape[0],)))
            if self.f_dim:
                with _masked(ragged, 1):
                    state = self.condition(state, pyro.sample("f", self.proposal_f(x, mask)))
            for t in pyro.markov(range(1, mask.shape[1] + 1)):
                with _masked(ragged, t):
                    z_t = pyro.sample(f"z_{t}", self.proposal(state, c[:, t - 1]))
                    state = self.advance(state, z_t, x[:, t - 1])


def _unwritten(program: nn.Module, function: str) -> NotImplementedError:
    return NotImplementedError(f"{type(program).__name__} must write {function}")


def _masked(mask: Tensor | None, t: int) -> Any:
    return nullcontext() if mask is None else poutine.mask(mask=mask[:, t - 1])


_OWNED = WeakIdKeyDictionary()  # parameters of modules of this process, seen here
_SEEN: WeakSet[nn.Module] = WeakSet()


def require_taken(name: str, module: Any) -> None:
    """Refuse a parameter store with values for a module that no module has taken: a loaded one.

    Without ``update_module_params`` the module would go on with the values it was made with.
    """
    if not isinstance(module, nn.Module):
        return
    if module not in _SEEN:
        _own(module)
    stored = dict(pyro.get_param_store().named_parameters())
    prefix = f"{name}$$$"
    if all(p in _OWNED for site, p in stored.items() if site.startswith(prefix)):
        return
    _own(module)  # its parameters may be others than those seen
    for path, parameter in module.named_parameters():
        site = f"{prefix}{path}"
        if stored.get(site, parameter) not in _OWNED:
            raise ValueError(
                f"the parameter store holds values for {site!r} that are not this {name}'s: "
                "loaded ones, or those of a module registered by hand; call "
                f"pyro.module({name!r}, {name}, update_module_params=True) to take them, or "
                "pyro.clear_param_store() to drop them"
            )


def _own(module: nn.Module) -> None:
    _SEEN.add(module)
    for parameter in module.parameters():
        _OWNED[parameter] = True


def _register(name: str, module: Any) -> None:
    """``pyro.module``, refusing a store that holds another module's tensors under these names.

    Outside all handlers no parameter is registered, so a bare call works next to a trained module.
    """
    require_taken(name, module)
    if not am_i_wrapped() or not isinstance(module, nn.Module):
        return
    stored = dict(pyro.get_param_store().named_parameters())
    for path, parameter in module.named_parameters():
        site = f"{name}$$${path}"
        if stored.get(site, parameter) is not parameter:
            raise ValueError(
                f"the parameter store holds another {name}'s tensor under {site!r}, so this "
                f"{name} would not be trained; call pyro.clear_param_store() first, or work "
                "inside pyro.get_param_store().scope()"
            )
    for path, parameter in module.named_parameters():
        if parameter.requires_grad:  # pyro.module warns of each that is frozen, such as a critic's
            pyro.param(f"{name}$$${path}", parameter)
