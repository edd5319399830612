"""What a critic is shown, and what becomes of its scores: views and roles.

A view picks the codes of prior and proposal that a critic compares, and so decides which part of
the rate it measures:

| view | critic sees | zero means |
|---|---|---|
| marginal | z_t | the marginals over data and h agree, no more |
| trajectory | z_1..z_t, both sides on the posterior path, differing in z_t | q(z_t given z_<t) = E[p(z_t given h)] |
| trajectory_redrawn | one-step prior draws against proposal draws, read as sequences | not zero at q = p |
| conditional | z_t, h_t | aggregate mismatch 0: ELBO = reconstruction - information |
| joint | z_t, h_t, x_t | q = p: ELBO = reconstruction, and z carries nothing |

A role says what is compared, by which loss the critic learns, and where its scores go:

| role | compares | loss | scores go to |
|---|---|---|---|
| penalty | draws of prior and proposal, by a view | Wasserstein | the loss of model and guide |
| ratio | draws of the proposal, which has no density, and of a normal of its moments, with h and what the guide reads | log_ratio | the bound: log q = log r + T |
| ratio_to_prior | the same and the prior itself | log_ratio | the same, r being the prior |
| refine | draws of a base prior and of the proposal, in units of the base, with what the prior reads | log_ratio | the prior: p~(z given h) ~ p(z given h) exp r(z, h) |
| information | an f with the z of its own sequence, and with that of another | density_ratio | the loss, as a price of I(f; z), a nat a sequence |
| information_of_z | the same; f is a constant where the critic sees it | density_ratio | the same, through z alone |
| information_of_past | the latent of an image with its own first rows, and with another's | density_ratio | the same, for the guide of that latent |
"""  # noqa: E501 - tables

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Normal

from inference.constraints import Codes
from inference.densities import StepDensities
from inference.divergences import Divergence, log_ratio, normal_parameters, wasserstein
from inference.mutual_information import density_ratio
from inference.pairs import Pairs, pairs_of_f, pairs_of_past, pairs_of_z, scores_of_sequences

#: (densities, prior draws, posterior draws) -> codes of the prior and of the posterior
View = Callable[[StepDensities, Tensor, Tensor], tuple[Codes, Codes]]


def marginal(densities: StepDensities, prior: Tensor, posterior: Tensor) -> tuple[Codes, Codes]:
    """Show z_t alone."""
    return Codes(prior), Codes(posterior)


def trajectory(densities: StepDensities, prior: Tensor, posterior: Tensor) -> tuple[Codes, Codes]:
    """Show z_1..z_t, both sides sharing the posterior path before t and differing in z_t."""
    path = densities.z.detach()
    return Codes(prior, path=path), Codes(posterior, path=path)


def trajectory_redrawn(
    densities: StepDensities, prior: Tensor, posterior: Tensor
) -> tuple[Codes, Codes]:
    """Show what the paper's LSTM sees, read literally: one-step prior draws as their own path.

    Not zero at q = p unless the transition ignores z: redrawn codes lack the path's correlation.
    """
    return Codes(prior, path=prior), Codes(posterior, path=posterior)


def conditional(densities: StepDensities, prior: Tensor, posterior: Tensor) -> tuple[Codes, Codes]:
    """Show z_t and h_t, which is a constant here."""
    h = _hidden(densities)
    return Codes(prior, h), Codes(posterior, h)


def joint(densities: StepDensities, prior: Tensor, posterior: Tensor) -> tuple[Codes, Codes]:
    """Show z_t, h_t and x_t."""
    h = _hidden(densities)
    x = densities.x.expand(*h.shape[:-1], densities.x.shape[-1])
    context = torch.cat([h, x], dim=-1)
    return Codes(prior, context), Codes(posterior, context)


VIEWS: dict[str, View] = {
    view.__name__: view for view in (marginal, trajectory, trajectory_redrawn, conditional, joint)
}


@runtime_checkable
class Refinable(Protocol):
    """A prior that draws candidates from a base and chooses among them by a critic."""

    base: Any
    critic: Any
    num_candidates: int

    def codes(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of the base, and a value, ``(T, K, B, Z)``, in units of the base; and h."""
        ...


def scores_of_frames(
    critic: Any, codes: tuple[Codes, Codes], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of prior and posterior ``(N,)`` at observed frames."""
    prior, posterior = (critic(*side) for side in codes)
    keep = mask.expand_as(prior)
    if not bool(keep.any()):
        raise ValueError("mask must observe a frame for a critic to compare, but has none")
    return prior[keep], posterior[keep]


class Role(NamedTuple):
    """A use of a critic."""

    name: str
    #: (densities, posterior draws, view, standardise) -> codes of prior and posterior, or pairs
    codes: Callable[..., Any]
    loss: Callable[[], Divergence]  # where none is given
    frozen: bool  # whether the critic is part of the model, which must not move it
    #: (critic, densities) -> log-densities of prior and proposal, where scores are in the bound
    log_ratio: Callable[[Any, StepDensities], tuple[Tensor, Tensor]] | None = None
    #: (critic, codes, mask) -> scores of what is compared
    scores: Callable[[Any, Any, Tensor], tuple[Tensor, Tensor]] = scores_of_frames
    of_sequences: bool = False  # whether it compares whole sequences, drawn in one pass


def shown(
    densities: StepDensities, posterior: Tensor, view: View, standardise: bool
) -> tuple[Codes, Codes]:
    """Draws of the prior and of the posterior by a view, at the states of one rollout."""
    return _seen(densities, draw(densities.prior), posterior, view, standardise)


def shown_free(
    run: StepDensities,
    densities: StepDensities,
    posterior: Tensor,
    view: View,
    standardise: bool,
) -> tuple[Codes, Codes]:
    """A free run and the posterior by a view, each at states of its own."""
    prior, _ = _seen(run, run.z, run.z, view, standardise)
    _, proposal = _seen(densities, posterior, posterior, view, standardise)
    return prior, proposal


def _seen(
    densities: StepDensities, prior: Tensor, posterior: Tensor, view: View, standardise: bool
) -> tuple[Codes, Codes]:
    if standardise:
        loc, scale = normal_parameters(densities.prior)
        prior, posterior = (prior - loc) / scale, (posterior - loc) / scale
    return view(densities, prior, posterior)


def _candidates(
    densities: StepDensities, posterior: Tensor, view: View, standardise: bool
) -> tuple[Codes, Codes]:
    if not isinstance(densities.prior, Refinable):
        raise NotImplementedError(
            "role 'refine' needs a model whose prior is refined by this critic, got a "
            f"{type(densities.prior).__name__}; make it by recipes.refined(recipe)"
        )
    drawn, given, h = densities.prior.codes(posterior)
    return Codes(drawn, h), Codes(given, h)


_MOMENTS = 16  # draws of an implicit proposal that its mean and deviation are taken from


def _read(densities: StepDensities) -> Tensor:
    """What a proposal may depend on: h, and what the guide has read of x; constants."""
    h = _hidden(densities)
    if densities.c is None:
        raise NotImplementedError("role 'ratio' needs a model with a rollout")
    c = densities.c.detach()
    return torch.cat([h, c.expand(*h.shape[:-1], c.shape[-1])], dim=-1)


@torch.no_grad()
def _moments(densities: StepDensities) -> Normal:
    """The normal of a proposal's mean and deviation."""
    drawn = draw(densities.proposal, _MOMENTS)
    return Normal(drawn.mean(dim=0), drawn.std(dim=0).clamp(min=1e-6))


def _contrasted(
    densities: StepDensities, posterior: Tensor, view: View, standardise: bool
) -> tuple[Codes, Codes]:
    r, seen = _moments(densities), _read(densities)
    return Codes(torch.randn_like(posterior), seen), Codes((posterior - r.loc) / r.scale, seen)


def _of_moments(critic: Any, densities: StepDensities) -> tuple[Tensor, Tensor]:
    r, prior = _moments(densities), _prior(densities)
    score = critic((densities.z - r.loc) / r.scale, _read(densities), None)
    log_r = r.log_prob(densities.z).sum(dim=-1)
    return prior.log_prob(densities.z), log_r + score


def _beside_prior(
    densities: StepDensities, posterior: Tensor, view: View, standardise: bool
) -> tuple[Codes, Codes]:
    seen = _read(densities)
    return Codes(draw(densities.prior), seen), Codes(posterior, seen)


def _of_prior(critic: Any, densities: StepDensities) -> tuple[Tensor, Tensor]:
    # z follows T alone: what log p and log r = log p say of it cancels
    log_prior = _prior(densities).log_prob(densities.z.detach())
    return log_prior, log_prior.detach() + critic(densities.z, _read(densities), None)


def _prior(densities: StepDensities) -> Any:
    if densities.prior is None:
        raise NotImplementedError("role 'ratio' needs a model with a rollout")
    return densities.prior


def _of_sequences(name: str, codes: Callable[..., Pairs]) -> Role:
    return Role(
        name, codes, density_ratio, frozen=False, scores=scores_of_sequences, of_sequences=True
    )


def leaf_of(codes: Any) -> tuple[Tensor, Any]:
    """The posterior's codes as a new leaf for gradients, and the codes with it in place."""
    if isinstance(codes, Pairs):
        z = codes.z.detach().requires_grad_()
        return z, codes._replace(z=z)
    z = codes[1].z.detach().requires_grad_()
    return z, (codes[0], codes[1]._replace(z=z))


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("penalty", shown, wasserstein, frozen=False),
        Role("refine", _candidates, log_ratio, frozen=True),
        Role("ratio", _contrasted, log_ratio, frozen=False, log_ratio=_of_moments),
        Role("ratio_to_prior", _beside_prior, log_ratio, frozen=False, log_ratio=_of_prior),
        _of_sequences("information", pairs_of_f),
        _of_sequences("information_of_z", pairs_of_z),
        _of_sequences("information_of_past", pairs_of_past),
    )
}


def _hidden(densities: StepDensities) -> Tensor:
    if densities.h is None:
        raise NotImplementedError(
            "views conditional and joint need the state h_t, which a program without rollout "
            "does not tell; use marginal or trajectory"
        )
    return densities.h.detach()


def draw(distribution: Any, *shape: int) -> Tensor:
    """Draw codes that gradients can follow, ``(*shape, T, K, B, Z)``."""
    if distribution is None:
        raise NotImplementedError("a critic needs a prior and a proposal of normals to draw from")
    return distribution.rsample(torch.Size(shape))
