"""Requirements on models, guides, penalties, hooks and numbers."""

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

from torch import Size, Tensor, nn
from torch.distributions import Distribution

from inference.densities import StepDensities

Program = Callable[..., Any]  #: a Pyro model or guide, a function or a module


@runtime_checkable
class HasRollout(Protocol):
    """A model that gives all its step densities at once, faster than by tracing.

    For FIVO it takes ``select=``, called after every step as ``select(t, log_prior,
    log_emission, log_proposal)`` with t from 0 and constants ``(K, B)``; the result is the
    indices ``(K, B)`` of the particles that go on, or None for all. Truncated back-propagation
    gives ``start=``, the state before step 1; objectives may give ``recompute=``, ``compile=``
    and, with the latter, ``distributions=False``: these may be None. A critic's hook gives
    ``scored=False`` where it is taken: log-densities and emission may be None.
    """

    def rollout(self, guide: Any, x: Tensor, *args: Any, **kwargs: Any) -> StepDensities:
        """Step densities of model and guide."""
        ...


@runtime_checkable
class Stepwise(Protocol):
    """A model that can be asked for one step: needed where a state is held fixed, or chosen.

    A model whose steps share a latent f also has ``f_dim`` above 0, ``prior_f(batch_shape)`` and
    ``condition(state, f)``, its guide ``proposal_f(x, mask)``; step densities count f with
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


@runtime_checkable
class StepwiseGuide(Protocol):
    """A guide that can be asked for one step."""

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """c, ``(B, T, C)``: the guide's view of the data, computed once for all steps."""
        ...

    def proposal(self, state: Any, c_t: Tensor) -> Distribution:
        """q(z_t | state, c_t)."""
        ...


@runtime_checkable
class Penalty(Protocol):
    """A price per frame that an objective subtracts, with a weight; ``Adversarial`` is one."""

    name: str
    weight: float | Callable[[float], float]

    def penalty(self, densities: StepDensities) -> Tensor:
        """Scalar, averaged over observed frames."""
        ...


def at_least(least: float, hint: str = "", /, **numbers: float) -> None:
    """Check finite numbers, named as the arguments they are, against a lower limit.

    Raises:
        TypeError: not a number.
        ValueError: a number below the limit, infinite or NaN; ``hint`` ends the message.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {said(value)}")
        if not (value >= least and value < math.inf):
            limit = "finite" if least == -math.inf or value == math.inf else f"at least {least}"
            raise ValueError(f"{name} must be {limit}, got {value}{hint}")


def counts(least: int, hint: str = "", /, **numbers: int) -> None:
    """Check whole numbers as :func:`at_least` does.

    Raises:
        TypeError: not a whole number.
        ValueError: a number below the limit; ``hint`` ends the message.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {said(value)}")
    at_least(least, hint, **numbers)


def given(**values: Any) -> dict[str, Any]:
    """Those arguments that are not None, which stands for a default."""
    return {name: value for name, value in values.items() if value is not None}


def of_kind(kind: Any, expected: str, /, **values: Any) -> None:
    """Check that values, named as the arguments they are, are objects of some kind.

    Raises:
        TypeError: another kind, or the class itself; ``expected`` says in words what is.
    """
    for name, value in values.items():
        if isinstance(value, type) or not isinstance(value, kind):
            raise TypeError(f"{name} must be {expected}, got {said(value)}")


def one_of(known: Iterable[str], /, **values: Any) -> None:
    """Check that values, named as the arguments they are, are among known names.

    Raises:
        ValueError: another; the known ones are listed.
    """
    for name, value in values.items():
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def said(value: Any) -> str:
    """A value in a few words of one line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    short = len(text) <= 40 and "\n" not in text
    return f"{text} ({type(value).__name__})" if short else type(value).__name__


def require_programs(model: Any, guide: Any) -> None:
    """Refuse what is no Pyro program at all.

    Raises:
        TypeError: a class, a recipe, or another object that cannot be called.
    """
    for argument, value in (("model", model), ("guide", guide)):
        served = callable(value) or isinstance(value, HasRollout | StepwiseGuide)
        if isinstance(value, type) or not served:
            part = getattr(value, argument, None)
            hint = f"; give its {argument}" if callable(part) else ""
            raise TypeError(
                f"{argument} must be a Pyro program, a function or a module, got {said(value)}"
                f"{hint}"
            )


def require_finite(**programs: Any) -> None:
    """Refuse modules, named as the arguments they are, with parameters that are not finite.

    Raises:
        ValueError: naming the parameter.
    """
    for argument, program in programs.items():
        for name, p in program.named_parameters() if isinstance(program, nn.Module) else ():
            if not bool(p.isfinite().all()):
                raise ValueError(
                    f"{argument} has a parameter that is not finite, {name}, as after a training "
                    "that diverged; take the parameters before that"
                )


def require_stepwise(model: Any, guide: Any) -> None:
    """Refuse a model and guide that cannot be asked for single steps, or do not belong together.

    Args:
        model: to have init, transition, emission and advance.
        guide: to have encode and proposal.

    Raises:
        TypeError: naming the functions that are missing.
        ValueError: from a model that tells its own guides from others.
    """
    for argument, value in (("model", model), ("guide", guide)):
        if isinstance(value, type):
            raise TypeError(f"{argument} must be an object, got the class {value.__name__}")
    for argument, value, names in (
        ("model", model, ("init", "transition", "emission", "advance")),
        ("guide", guide, ("encode", "proposal")),
    ):
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
