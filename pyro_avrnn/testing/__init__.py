"""Conformance checks: do your own model and guide keep the library's contract?

Pyro programs, rollouts, bounds, filters and masks are all derived from a model's four functions
and a guide's two, so a mistake in one of them shows up far from where it was made. These checks
find it where it is. In your own test::

    from pyro_avrnn.testing import check

    check(my_model, my_guide, x)  # x (B, T, X), a few short sequences

Nothing happens if all is well. Otherwise an ``AssertionError`` says in one sentence which check
failed, in which function, at which step (counted from 1), and what was wrong. Every check can be
called by itself, with the same arguments. Two paths to one number are compared at rtol 1e-10 in
float64 and 1e-4 in float32, so float64 detects more. The checks run in evaluation mode with a
parameter store of their own, and leave the random state as it was.
"""

from torch import Tensor

from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.testing.critics import check_critic as check_critic
from pyro_avrnn.testing.functions import (
    check_broadcasting,
    check_ownership,
    check_pure,
    check_shapes,
)
from pyro_avrnn.testing.programs import (
    check_finite,
    check_generation,
    check_loop_is_rollout,
    check_padded_is_unpadded,
    check_padding_is_not_read,
    check_sites,
    check_state_dict,
)
from pyro_avrnn.testing.subject import Check

#: In the order of :func:`check`: the first check that sees a mistake should describe it best.
CHECKS: tuple[Check, ...] = (
    check_shapes,
    check_pure,
    check_ownership,
    check_broadcasting,
    check_sites,
    check_finite,
    check_loop_is_rollout,
    check_padding_is_not_read,
    check_padded_is_unpadded,
    check_generation,
    check_state_dict,
)


def check(
    model: SequenceModel,
    guide: SequenceGuide,
    x: Tensor,
    mask: Tensor | None = None,
    num_particles: int = 3,
) -> None:
    """Run all checks of this module, in the order of :data:`CHECKS`.

    Args:
        model: your own, or any other.
        guide: proposes its latents.
        x: data ``(B, T, X)`` that the model can score; (2, 4, X) will do.
        mask: ``(B, T)`` bool, a prefix, or None: checks of padding then shorten x themselves.
        num_particles: K, at least 2. If K equals B or T, which could hide a mistake, the next
            larger number that does not is taken.

    Raises:
        AssertionError: naming the check, the function and the step.
        ValueError: data that the model refuses, or fewer than 2 particles.
        TypeError: anything but a SequenceModel and a SequenceGuide.

    Example:
        >>> import torch
        >>> from pyro_avrnn import recipes
        >>> r = recipes.vrnn(x_dim=3, z_dim=2, h_dim=4)
        >>> check(r.model, r.guide, torch.zeros(2, 4, 3))
    """
    for each in CHECKS:
        each(model, guide, x, mask, num_particles)
