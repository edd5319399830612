"""Gradients that a loss's own value lacks, as terms whose value is zero."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inference.bounds import evidence_path, iwae, stretches, temper, tempered
from inference.densities import StepDensities
from inference.divergences import normal_parameters


def norms_of_gradients(
    terms: dict[str, Tensor], parameters: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Norm of the gradient of each scalar term in the parameters, by the term's name."""
    norms = {}
    for name, term in terms.items():
        norms[name] = term.new_zeros(())
        if term.requires_grad:
            found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norms[name] = torch.nn.utils.get_total_norm([g for g in found if g is not None])
    return norms


def doubly_reparameterised(
    densities: StepDensities, model: nn.Module, guide: nn.Module, kl_weight: float
) -> Tensor:
    """Zero; turns the plain gradient of ``-iwae`` for the guide's own parameters into the other.

    The plain gradient holds the score of q, whose expectation, by reparameterising once
    more, is a path derivative: each path then counts ``(1 - b) w + b w^2`` instead of w,
    with normalised weights w and the exponent b of the prior and the proposal.

    Args:
        densities: of a rollout, ``(T, K, B)``.
        model, guide: that made it; parameters that both have keep the plain gradient.
        kl_weight: b.

    Source: Tucker et al. (2019), https://arxiv.org/abs/1810.04152, eq. 8.
    """
    shared = {id(p) for p in model.parameters()}  # these enter p, too, and stay plain
    own = [p for p in guide.parameters() if p.requires_grad and id(p) not in shared]
    assert densities.c is not None  # of a rollout
    program: Any = guide
    with _constant(own):
        proposal = program.proposal(densities.states, densities.c.detach())
        log_proposal = proposal.log_prob(densities.z)
    if densities.f is not None:
        loc, scale = (p.detach() for p in normal_parameters(densities.proposal_f))
        of_f = torch.distributions.Normal(loc, scale).log_prob(densities.f).sum(dim=-1)
        log_proposal = torch.cat([(log_proposal[0] + of_f).unsqueeze(0), log_proposal[1:]])
    log_proposal = torch.where(densities.mask, log_proposal, 0.0)
    path = temper(densities.log_prior, densities.log_emission, log_proposal, kl_weight)
    plain = tempered(densities, kl_weight)
    share = plain.detach().sum(dim=0).softmax(dim=0)
    wanted = ((1.0 - kl_weight) * share + kl_weight * share.square()) * path.sum(dim=0)
    difference = iwae(plain).sum() - wanted.sum()  # of losses, hence the order
    return _with_gradient(difference, own)


def ancestor_score(
    log_weight: Tensor,
    resampled: Tensor,
    parents: Sequence[Tensor | None],
    expected: Tensor | float = 0.0,
) -> Tensor:
    """Sum over resamplings of log P(ancestors) times what was gained after them, (B,).

    Without what is expected its gradient's deviation grows as the root of K: the gain is many
    nats, and the score of K choices is the sum of K. With it, it is bounded in K.

    Args:
        log_weight: ``(T, K, B)``, each step's own.
        resampled: ``(T - 1, B)`` bool, whether particles were resampled after a step.
        parents: of each of these steps the indices ``(K, B)``, or None where none resampled.
        expected: ``(T, B)``, a guess of the log-evidence gained after each step, made without
            knowing these parents, such as another filter's.

    Source: Naesseth et al. (2018), https://arxiv.org/abs/1705.11140, eq. 8.
    """
    sums = stretches(log_weight, resampled)  # (S, K, B)
    path = evidence_path(log_weight.detach(), resampled)
    surprise = path[-1] - path - expected  # (T, B)
    log_choice = sums.log_softmax(dim=1)
    count = resampled.long().cumsum(dim=0) - 1  # which stretch ended, (T - 1, B)
    total = log_weight.new_zeros(log_weight.shape[-1])
    for t, chosen_at_t in enumerate(parents):
        if chosen_at_t is None:
            continue
        stretch = count[t].clamp(min=0)
        index = stretch.expand(1, *chosen_at_t.shape)
        chosen = log_choice.gather(0, index)[0].gather(0, chosen_at_t).sum(dim=0)
        total = total + torch.where(resampled[t], chosen * surprise[t], 0.0)
    return total


@contextmanager
def _constant(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _with_gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Zero, whose gradient with respect to these parameters is that of ``value``."""
    zero = value.new_zeros(())
    if not parameters:
        return zero
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            zero = zero + ((p - p.detach()) * gradient).sum()
    return zero
