"""Faults of divergences, distances, implicit guides, twists, resamplers and free runs."""

from tests.mutations.fault import Fault

VALUES, TWISTS = "tests/statistical/test_divergences.py", "tests/statistical/test_twists.py"
SOFT, FREE = "tests/statistical/test_differentiable.py", "tests/statistical/test_free_runs.py"
IMPLICIT, ROWS = "tests/statistical/test_implicit.py", "tests/integration/test_critic_rows.py"
DIVERGENCES, MATCHING = "inference/divergences.py", "inference/matching.py"
FORESIGHT, MOVED = "inference/twists.py", "inference/differentiable.py"

FAULTS = [
    Fault(
        DIVERGENCES,
        "squared Hellinger: half of the exponent is lost",
        "_exp(-0.5 * posterior).mean()",
        "_exp(-posterior).mean()",
        (VALUES,),
    ),
    Fault(
        DIVERGENCES,
        "Jensen-Shannon: the sum of both sides, not the average",
        "math.log(2.0) - 0.5 * _logistic(prior, posterior)",
        "math.log(2.0) - _logistic(prior, posterior)",
        (VALUES,),
    ),
    Fault(
        DIVERGENCES,
        "least squares: the prior's probability is the proposal's",
        "prior.sigmoid().square().mean()",
        "prior.neg().sigmoid().square().mean()",
        (VALUES,),
    ),
    Fault(
        DIVERGENCES,
        "reverse KL is KL",
        "ratio_bound(-posterior, -prior)",
        "ratio_bound(prior, posterior)",
        (VALUES,),
    ),
    Fault(
        MATCHING,
        "the mean discrepancy counts a row with itself",
        "k.sum() - k.diagonal().sum() for k in",
        "k.sum() for k in",
        (VALUES,),
    ),
    Fault(
        MATCHING,
        "slices have random lengths",
        "unit = drawn / drawn.norm(dim=0)",
        "unit = drawn",
        (VALUES,),
    ),
    Fault(
        MATCHING,
        "padding is compared",
        "keep = densities.mask.expand_as(proposal[..., 0])",
        "keep = torch.ones_like(proposal[..., 0], dtype=torch.bool)",
        (VALUES,),
    ),
    Fault(
        MATCHING,
        "both sides have the context of the first",
        "both = zip(rows, contexts, strict=True)",
        "both = ((z, contexts[0]) for z in rows)",
        (FREE,),
    ),
    Fault(
        FORESIGHT,
        "the twist is asked at the end",
        "if t in (0, len(self.codes)):",
        "if t == 0:",
        (TWISTS,),
    ),
    Fault(
        FORESIGHT,
        "codes of the step before",
        "return torch.where(self.mask[t], self._score(h, self.codes[t]), 0.0)",
        "return torch.where(self.mask[t], self._score(h, self.codes[t - 1]), 0.0)",
        (TWISTS,),
    ),
    Fault(
        FORESIGHT,
        "the classifier learns the wrong way round",
        "F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()",
        "F.softplus(scores[0]).mean() + F.softplus(-scores[1]).mean()",
        (TWISTS,),
    ),
    Fault(
        "pyro_avrnn/rollout.py",
        "a segment asks the twist about its own first steps",
        "all_before(after, start + 1) - all_before(before, start)",
        "all_before(after, 1) - all_before(before, 0)",
        (TWISTS,),
    ),
    Fault(
        MOVED,
        "soft resampling weighs by the mixture alone",
        "return (log_weight - self._mixture(log_weight)).gather(0, parents)",
        "return (0.0 * log_weight - self._mixture(log_weight)).gather(0, parents)",
        (SOFT,),
    ),
    Fault(
        MOVED,
        "the stopped gradient is that of the parent's place",
        "return (log_weight - log_weight.detach()).gather(0, parents)",
        "return log_weight - log_weight.detach()",
        (SOFT,),
    ),
    Fault(
        MOVED,
        "Sinkhorn is sharp from the start",
        "max(self.regularisation, 0.75**i)",
        "self.regularisation",
        (SOFT,),
    ),
    Fault(
        MOVED,
        "the old potential is not rescaled",
        "f, kernel = f * (before / entropy), -cost / entropy",
        "f, kernel = f * (entropy / before), -cost / entropy",
        (SOFT,),
    ),
    Fault(
        "inference/roles.py",
        "codes are not in units of their moments",
        "Codes((posterior - r.loc) / r.scale, seen)",
        "Codes(posterior - r.loc, seen)",
        (IMPLICIT,),
    ),
    Fault(
        "inference/roles.py",
        "z follows the prior as well",
        "_prior(densities).log_prob(densities.z.detach())",
        "_prior(densities).log_prob(densities.z)",
        (f"{IMPLICIT}::test_with_the_exact_ratio_it_is_the_elbo",),
    ),
    Fault(
        "inference/roles.py",
        "both sides of a free run are at its states",
        "_, proposal = _seen(densities, posterior, posterior, view, standardise)",
        "_, proposal = _seen(run, posterior, posterior, view, standardise)",
        (FREE,),
    ),
    Fault(
        "inference/free_runs.py",
        "a free run has no gradient",
        "distribution.rsample() if distribution.has_rsample else distribution.sample()",
        "distribution.sample()",
        (FREE,),
    ),
    Fault(
        "inference/adversarial.py",
        "the critic's accuracy is that of one side",
        "right = right + ((posterior > middle) != up).double().mean()",
        "right = 2 * right",
        (FREE,),
    ),
    Fault(
        "inference/adversarial.py",
        "the slope is of an average frame",
        "slope.norm(dim=-1).sum().item()",
        "slope.norm(dim=-1).mean().item()",
        (FREE,),
    ),
    Fault(
        "pyro_avrnn/cli/runs.py",
        "the model learns on while the guide is fitted to it",
        "recipe.model.requires_grad_(False)",
        "recipe.model.requires_grad_(True)",
        (ROWS,),
    ),
]
