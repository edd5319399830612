"""The rate split: how much of the KL is information, how much aggregate mismatch, as bounds.

E_x KL(q(z|x,h) || p(z|h)) = I_q(x; z | h) + KL(q(z|h) || p(z|h)), the last averaged over h.
A classifier on (z, h), trained on one set and evaluated on another, gives a lower bound on the
mismatch in expectation (Nguyen, Wainwright and Jordan 2010, eq. 8); the rate minus that is an
upper bound on the information. A single estimate of the mismatch may be negative and is reported
as it is, and so is the information: flooring at 0 would bias the averages of both.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.densities import check_batch
from inference.divergences import normal_parameters
from inference.modes import evaluating
from inference.protocols import Program, at_least, counts, of_kind, require_programs
from inference.random import seeded
from inference.traces import step_densities

LEAST_SEQUENCES = 5  #: training sequences that a rate split needs


class RateSplit(NamedTuple):
    """Nats per frame on the held-out sequences, with the standard error of the mismatch.

    The rate is that of z_t; the KL of a latent that all steps share is not in it.
    """

    rate: float
    aggregate_mismatch_at_least: float
    aggregate_mismatch_se: float
    information_at_most: float


def rate_split(
    model: Program,
    guide: Program,
    train: tuple[Tensor, Tensor | None],
    heldout: tuple[Tensor, Tensor | None],
    *,
    steps: int = 300,
    width: int = 64,
    bound: float = 8.0,
    seed: int = 0,
) -> RateSplit:
    """Split the rate of a trained model and guide into information and aggregate mismatch.

    Args:
        model: a model with a state (``rollout``).
        guide: its guide.
        train: x ``(B, T, X)`` and mask ``(B, T)`` that the classifier learns from; a fifth of
            the sequences is kept for early stopping.
        heldout: x and mask of other sequences, on which it is evaluated.
        steps, width: training steps of the classifier, and units of its two hidden layers.
        bound: largest log-ratio it may give; the estimate is a lower bound for any value.
        seed: seed of draws and initial weights.

    Model and guide are in evaluation mode meanwhile.

    Raises:
        ValueError: fewer than 5 training sequences, a number out of range, or data as
            ``evaluate`` refuses them.
        NotImplementedError: a program without a state.
    """
    counts(0, steps=steps)
    counts(1, width=width)
    at_least(0.0, bound=bound)
    require_programs(model, guide)
    train, heldout = _checked(model, train=train), _checked(model, heldout=heldout)
    if len(train[0]) < LEAST_SEQUENCES:
        raise ValueError(
            f"train must hold at least {LEAST_SEQUENCES} sequences, got {len(train[0])}"
        )
    with seeded(seed):
        order = torch.randperm(len(train[0]))
        stop = max(len(order) // 5, 1)
        with evaluating(model, guide):
            fitting, stopping = (
                _frames(model, guide, *(part[i] for part in train))
                for i in (order[stop:], order[:stop])
            )
            reading = _frames(model, guide, *heldout)
        ratio = _LogRatio(fitting, width, bound)
        _fit_classifier(ratio, fitting, stopping, steps)
    with torch.no_grad():
        value = _nwj(*ratio(reading))
    total = int(reading.sequence.max()) + 1
    sums = value.new_zeros(total).index_add(0, reading.sequence, value - value.mean())
    error = float(sums.square().sum().sqrt()) / len(value)
    rate, mismatch = float(reading.kl.mean()), float(value.mean())
    return RateSplit(rate, mismatch, error, rate - mismatch)


def _checked(model: Program, **named: Any) -> tuple[Tensor, Tensor]:
    """Data and mask, with a frame at least."""
    ((name, data),) = named.items()
    of_kind(list | tuple, "(x, mask)", **named)
    x, mask = check_batch(model, *data)
    if not bool(mask.any()):
        raise ValueError(f"{name} must observe a frame, but its mask has none")
    return x, mask


class _Frames(NamedTuple):
    """Observed frames as rows. Codes are in units of a normal prior, raw for other priors."""

    posterior: Tensor  # (N, Z), (z - mu_p(h)) / sigma_p(h) of a draw of q
    prior: Tensor  # (N, Z), the same of a draw of p
    features: Tensor  # (N, H)
    kl: Tensor  # (N,), log q - log p of the draw
    sequence: Tensor  # (N,), index of the frame's sequence


@torch.no_grad()
def _frames(model: Program, guide: Program, x: Tensor, mask: Tensor) -> _Frames:
    rows = []
    for index in torch.arange(len(x), device=x.device).split(64):
        d: Any = step_densities(model, guide, x[index], mask[index])
        if d.h is None:
            raise NotImplementedError(
                "rate_split needs the state h_t, which a program without a rollout does not tell; "
                "use a model and guide of this library's kind"
            )
        keep = d.mask[:, 0]
        try:
            loc, scale = normal_parameters(d.prior)
            of_prior = torch.randn_like(d.z)
        except NotImplementedError:
            loc, scale = torch.zeros(()).to(d.z), torch.ones(()).to(d.z)
            of_prior = d.prior.sample()
        kl = (d.log_proposal - d.log_prior)[:, 0]
        if d.f is not None:  # whose KL is counted with step 1, and is no rate of z
            kl[0] -= (d.proposal_f.log_prob(d.f) - d.prior_f.log_prob(d.f))[0]
        # given h, standardising z is one to one: the ratio is unchanged and easier to learn
        columns = ((d.z - loc) / scale, of_prior, d.h)
        rows.append((*(c[:, 0][keep] for c in columns), kl[keep], index.expand_as(keep)[keep]))
    return _Frames(*(torch.cat(column) for column in zip(*rows, strict=True)))


class _LogRatio(nn.Module):
    """log q(z | h) - log p(z | h), at most ``bound`` in size; h in units of ``frames``."""

    def __init__(self, frames: _Frames, width: int, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.shift = frames.features.mean(dim=0)
        self.spread = frames.features.std(dim=0) + 1e-6
        width_in = frames.features.shape[-1] + frames.posterior.shape[-1]
        self.net = nn.Sequential(
            nn.Linear(width_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 1),
        ).to(frames.features)  # fmt: skip

    def forward(self, frames: _Frames) -> tuple[Tensor, Tensor]:
        """Log-ratios (N,) of the posterior's codes, and of the prior's."""
        features = (frames.features - self.shift) / self.spread

        def of(codes: Tensor) -> Tensor:
            value = self.net(torch.cat([codes, features], dim=-1)).squeeze(-1)
            return self.bound * torch.tanh(value / self.bound)

        return of(frames.posterior), of(frames.prior)


def _fit_classifier(ratio: _LogRatio, fitting: _Frames, stopping: _Frames, steps: int) -> None:
    """Train by logistic regression; end with the parameters best on ``stopping``."""
    optim = torch.optim.AdamW(ratio.parameters(), lr=3e-3, weight_decay=1e-2)
    # where densities are not numbers nothing improves, and the result is NaN
    best, best_loss = ratio.state_dict(), float("inf")
    for i in range(steps + 1):
        if i % 20 == 0:
            with torch.no_grad():
                loss = -float(_nwj(*ratio(stopping)).mean())
            if loss < best_loss:
                best_loss, best = loss, {k: v.clone() for k, v in ratio.state_dict().items()}
        index = torch.randint(len(fitting.features), (min(2048, len(fitting.features)),))
        real, fake = ratio(_Frames(*(column[index] for column in fitting)))
        cross_entropy = F.softplus(-real).mean() + F.softplus(fake).mean()
        optim.zero_grad(set_to_none=True)
        cross_entropy.backward()
        optim.step()
    ratio.load_state_dict(best)


def _nwj(posterior: Tensor, prior: Tensor) -> Tensor:
    """Terms (N,) whose mean bounds KL(q || p) from below, for any log-ratios of q and p."""
    return 1.0 + posterior - prior.exp()
