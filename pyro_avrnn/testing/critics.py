"""Checks of a critic of your own, its divergence and its view."""

from copy import deepcopy

import pyro.distributions as dist
import torch
from torch import Tensor

from inference import Adversarial, StepDensities, seeded

_STEPS, _SIZE, _SHIFT = 300, 256, 1.0


def check_critic(
    adversarial: Adversarial, z_dim: int, h_dim: int, x_dim: int, *, steps: int = _STEPS
) -> None:
    """Check what a penalty must do, on two normals of known distance.

    The critic gives a score a step. Padded codes reach neither penalty nor learning. The penalty
    moves prior and proposal alone, and ``improve`` the critic alone. After ``steps`` steps the
    penalty is larger between shifted normals than between equal ones, and its gradient draws
    the two together. A copy is checked: the critic stays as it was.

    Args:
        adversarial: ``Adversarial(critic, divergence=...)`` of role "penalty".
        z_dim, h_dim, x_dim: sizes that the critic was built for.
        steps: of the critic.

    Raises:
        AssertionError: in one sentence, what is wrong.

    Example:
        >>> from pyro_avrnn.critics import FeedForwardCritic
        >>> critic = FeedForwardCritic(z_dim=2, context_dim=3, view="conditional")
        >>> check_critic(Adversarial(critic), z_dim=2, h_dim=3, x_dim=4)
    """
    with seeded(0):
        own = deepcopy(adversarial)  # its optimiser goes with it
        _check_scores(own, _normals(own, z_dim, h_dim, x_dim, _SHIFT))
        _check_padding(own, _normals(own, z_dim, h_dim, x_dim, _SHIFT))
        _check_owners(own, _normals(own, z_dim, h_dim, x_dim, _SHIFT))
        for _ in range(steps):
            own.improve(_detached(_normals(own, z_dim, h_dim, x_dim, _SHIFT)))
        _check_pull(own, _normals(own, z_dim, h_dim, x_dim, _SHIFT, size=4000))


def _normals(
    adversarial: Adversarial, z_dim: int, h_dim: int, x_dim: int, shift: float, size: int = _SIZE
) -> StepDensities:
    """Densities of two steps, of which every fourth sequence has one; means take gradients."""
    own = next(adversarial.critic.parameters())

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=own.dtype, device=own.device)

    zero = own.new_zeros(2, 1, size, z_dim)
    p = dist.Normal(zero.clone().requires_grad_(), torch.ones_like(zero)).to_event(1)
    q = dist.Normal((zero + shift).requires_grad_(), torch.ones_like(zero)).to_event(1)
    mask = torch.ones(2, 1, size, dtype=torch.bool, device=own.device)
    mask[1, :, ::4] = False
    none = zero[..., 0]
    h, x = noise(2, 1, size, h_dim), noise(2, 1, size, x_dim)
    return StepDensities(q.rsample(), h, x, mask, none, none, none, p, None, q)


def _detached(d: StepDensities) -> StepDensities:
    return d._replace(z=d.z.detach())


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(f"critic: {sentence}")


def _check_scores(adversarial: Adversarial, d: StepDensities) -> None:
    with torch.no_grad():
        prior, _ = adversarial.role.codes(d, d.z, adversarial.view, adversarial.standardise)
        scores = adversarial.critic(*prior)
    shape = tuple(getattr(scores, "shape", ()))
    codes = tuple(d.z.shape)
    _require(
        shape == codes[:-1],
        f"gives scores of shape {shape} for codes (T, K, B, Z) = {codes}, not (T, K, B)",
    )


def _check_padding(adversarial: Adversarial, d: StepDensities) -> None:
    spoilt = torch.where(d.mask.unsqueeze(-1), d.z, 50.0)
    values = []
    for z in (d.z, spoilt):
        with seeded(1):
            values.append(adversarial.penalty(d._replace(z=z)).detach())
    _require(
        bool(torch.isclose(values[0], values[1], rtol=1e-5)),
        "the penalty reads padded codes; average over the observed steps alone",
    )


def _check_owners(adversarial: Adversarial, d: StepDensities) -> None:
    parameters = list(adversarial.critic.parameters())
    penalty = adversarial.penalty(d)
    ends = [side.base_dist.loc for side in (d.prior, d.proposal)]  # type: ignore[union-attr]
    moved: tuple[Tensor | None, ...] = (None,) * 2
    if penalty.requires_grad:
        moved = torch.autograd.grad(penalty, [*ends, *parameters], allow_unused=True)
    _require(
        all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in moved[:2]),
        "the penalty's gradient does not reach prior and proposal; score codes without detaching "
        "them",
    )
    _require(all(g is None for g in moved[2:]), "the penalty moves the critic, a constant for it")
    before = [p.detach().clone() for p in parameters]
    told = adversarial.improve(_detached(d))
    _require(
        any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)),
        "improve moves no parameter of it; are all of them frozen, or its loss constant?",
    )
    _require(
        all(p.grad is None for p in parameters), "improve leaves gradients behind; clear them"
    )
    _require(
        all(torch.isfinite(torch.tensor(value)) for value in told.values()),
        f"improve gives metrics that are not finite: {told}",
    )


def _check_pull(adversarial: Adversarial, d: StepDensities) -> None:
    far = adversarial.penalty(d)
    ends = [side.base_dist.loc for side in (d.prior, d.proposal)]  # type: ignore[union-attr]
    prior, proposal = (g[d.mask].mean() for g in torch.autograd.grad(far, ends))
    _require(
        bool(proposal > 0 > prior),
        "after learning, the penalty pushes prior and proposal apart; does its sign fit the "
        "divergence, whose scores are high for the proposal, or for the prior if Wasserstein?",
    )
    with torch.no_grad():
        # the same prior on both sides
        near = adversarial.penalty(d._replace(z=d.z - _SHIFT))
    _require(
        bool(far.detach() > near + 0.05 * far.detach().abs()),
        f"after learning, the penalty is {float(far.detach()):.3g} between shifted normals and "
        f"{float(near):.3g} between equal ones, so it does not tell them apart",
    )
