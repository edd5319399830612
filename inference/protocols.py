"""What is asked of models, guides, critics and hooks, beyond being callable."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Size, Tensor
from torch.distributions import Distribution


class StepDensities(Protocol):
    """What guide and model say of every step; shapes begin with ``(T, K, B)``.

    ``mask`` is ``(T, 1, B)`` bool; a padded step has log-density 0 everywhere. ``h`` is what a
    critic may read of the state before step t, or None where a program has no such thing;
    ``prior`` and ``proposal`` are None where their family cannot be stacked over time.
    """

    @property
    def z(self) -> Tensor: ...  # noqa: D102 - shapes in the class docstring
    @property
    def h(self) -> Tensor | None: ...  # noqa: D102
    @property
    def x(self) -> Tensor: ...  # noqa: D102
    @property
    def mask(self) -> Tensor: ...  # noqa: D102
    @property
    def log_prior(self) -> Tensor: ...  # noqa: D102
    @property
    def log_emission(self) -> Tensor: ...  # noqa: D102
    @property
    def log_proposal(self) -> Tensor: ...  # noqa: D102
    @property
    def prior(self) -> Distribution | None: ...  # noqa: D102
    @property
    def emission(self) -> Distribution | None: ...  # noqa: D102
    @property
    def proposal(self) -> Distribution | None: ...  # noqa: D102
    @property
    def log_weight(self) -> Tensor: ...  # noqa: D102


@runtime_checkable
class HasRollout(Protocol):
    """A model that gives all its step densities at once, faster than by tracing.

    For FIVO it takes ``select=``, called after every step as ``select(t, log_prior,
    log_emission, log_proposal)`` with t from 0 and constants ``(K, B)``; what it returns are the
    indices ``(K, B)`` of the particles that go on, or None for all. Truncated back-propagation
    gives ``start=``, the state before step 1; objectives may give ``segment=``, ``compile=``.
    """

    def rollout(self, guide: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Step densities of model and guide."""
        ...


@runtime_checkable
class Stepwise(Protocol):
    """A model that can be asked for one step: needed where a state is held fixed, or chosen.

    A model whose steps share a latent f has ``f_dim`` above 0, ``prior_f(batch_shape)`` and
    ``condition(state, f)`` beside, its guide ``proposal_f(x, mask)``; step densities count f with
    step 1 and keep ``f``, ``prior_f`` and ``proposal_f``.
    """

    def init(self, batch_shape: Size) -> Any:
        """The state before step 1: a NamedTuple of tensors ``(*batch, ...)``."""
        ...

    def transition(self, state: Any) -> Distribution:
        """p(z_t | state)."""
        ...

    def emission(self, z_t: Tensor, state: Any) -> Distribution:
        """p(x_t | z_t, state)."""
        ...

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        """The next state."""
        ...


_PROPOSING = ("encode", "proposal")
_STEPS = ("init", "transition", "emission", "advance")


def require_stepwise(model: Any, guide: Any) -> None:
    """That a model and guide can be asked for single steps, and belong together.

    Args:
        model: to have init, transition, emission and advance.
        guide: to have encode and proposal.

    Raises:
        TypeError: naming the functions that are missing.
        ValueError: from a model that tells its own guides from others.
    """
    for argument, value, names in (("model", model, _STEPS), ("guide", guide, _PROPOSING)):
        missing = [name for name in names if not callable(getattr(value, name, None))]
        if missing:
            raise TypeError(
                f"{argument} must have the stepwise functions {', '.join(names)}, but "
                f"{getattr(value, '__name__', type(value).__name__)} lacks {', '.join(missing)}; "
                "ELBO and IWAE need no single steps"
            )
    if callable(fits := getattr(model, "require_guide", None)):
        fits(guide)


#: Called between SVI steps with (model, guide, *batch); gives numbers for the metrics. Where
#: ``fit`` truncates it is also given ``start=``, the state before its window.
Hook = Callable[..., dict[str, float]]
