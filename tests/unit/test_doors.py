"""What the verbs refuse at the door, in one sentence, and what they no longer lose in silence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from inference import (
    ELBO,
    IWAE,
    Adversarial,
    Checkpointing,
    Clock,
    Ramp,
    Records,
    Validation,
    calibrate,
    evaluate,
    fit,
    particle_filter,
    rate_split,
    seeded,
    sequence_codes,
)
from inference.constraints import spectral
from inference.divergences import wasserstein
from inference.protocols import at_least, counts
from pyro_avrnn import recipes
from pyro_avrnn.data import load
from pyro_avrnn.data.dataset import standardise
from pyro_avrnn.data.sequences import Sequences
from pyro_avrnn.generation import continue_from
from tests.unit.table import prefix_mask

B, T, X, Z, H = 4, 5, 2, 2, 4


def pair() -> recipes.Recipe:
    with seeded(1):
        return recipes.vrnn(X, Z, H)


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(B, T, X, generator=torch.Generator().manual_seed(2))
    return x, prefix_mask((5, 2, 4, 3))


Verb = Callable[[recipes.Recipe, Any, Any], Any]
VERBS: dict[str, Verb] = {
    "evaluate": lambda r, x, mask: evaluate(r.model, r.guide, x, mask, num_particles=2),
    "codes": lambda r, x, mask: sequence_codes(r.model, r.guide, x, mask),
    "filter": lambda r, x, mask: particle_filter(r.model, r.guide, x, mask, num_particles=2),
    "rollout": lambda r, x, mask: r.model.rollout(r.guide, x, mask),
    "continue": lambda r, x, mask: continue_from(
        r.model, r.guide, x, mask, steps=1, num_continuations=2
    ),
    "loss": lambda r, x, mask: ELBO()(r.model, r.guide, x, mask),
}
LEFT = torch.zeros(B, T, dtype=torch.bool)
LEFT[:, 2:] = True
GAP = torch.ones(B, T, dtype=torch.bool)
GAP[1, 2] = False
MASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "left-padded": (LEFT, ValueError, "mask must be a prefix"),
    "gap": (GAP, ValueError, "sequence 1 is observed again after a gap"),
    "narrow": (GAP[:, :3] | True, ValueError, r"mask must have shape \(4, 5\), got \(4, 3\)"),
    "wide": (torch.ones(B, T + 1, dtype=torch.bool), ValueError, "mask must have shape"),
    "integers": (GAP.int(), TypeError, "mask must be a tensor of dtype bool"),
    "numpy": (GAP.numpy(), TypeError, "mask must be a tensor of dtype bool, got ndarray"),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_takes_a_mask_checks_it(verb: str, name: str) -> None:
    mask, kind, message = MASKS[name]
    with pytest.raises(kind, match=message):
        VERBS[verb](pair(), batch()[0], mask)


DATA: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "numpy": (lambda x: x.numpy(), TypeError, "x must be a tensor of floating point numbers"),
    "integers": (lambda x: x.long(), TypeError, "floating point numbers, got torch.int64"),
    "2-D": (lambda x: x[0], ValueError, r"x must have shape \(B, T, 2\), got \(5, 2\); add the"),
    "float32": (lambda x: x.float(), TypeError, "x must be torch.float64 as the model is"),
    "features": (lambda x: x[..., :1], ValueError, "x must have shape"),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_takes_data_checks_it(verb: str, name: str) -> None:
    change, kind, message = DATA[name]
    with pytest.raises(kind, match=message):
        VERBS[verb](pair(), change(batch()[0]), batch()[1])


@pytest.mark.parametrize("verb", VERBS)
def test_without_a_mask_every_step_is_observed(verb: str) -> None:
    def found(mask: Any) -> Any:
        with seeded(3), torch.no_grad():
            return VERBS[verb](pair(), batch()[0], mask)

    assert str(found(None)) == str(found(torch.ones(B, T, dtype=torch.bool)))


@pytest.mark.parametrize("verb", ["evaluate", "codes", "loss"])
def test_model_and_guide_swapped_are_named(verb: str) -> None:
    r = pair()
    swapped = recipes.Recipe(r.guide, r.model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="swapped: got FilteringGuide.* and VRNN"):
        VERBS[verb](swapped, *batch())


@pytest.mark.parametrize("value", [1.5, "4", True, np.float64(2.0), [3]])
def test_counts_are_whole_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="num_particles must be a whole number, got"):
        IWAE(num_particles=value)
    with pytest.raises(TypeError, match="steps must be a whole number, got"):
        fit(SVI(*parts()), [batch()], steps=value)


def parts(loss: Any = None) -> tuple[Any, ...]:
    r = pair()
    return r.model, r.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO() if loss is None else loss


def test_numpys_whole_numbers_are_whole_numbers() -> None:
    counts(1, steps=np.int64(3))
    at_least(0, weight=np.float32(0.5))


@pytest.mark.parametrize("value", [float("nan"), -1e-9])
def test_nan_is_below_every_limit(value: float) -> None:
    with pytest.raises(ValueError, match="min_scale must be at least 0, got"):
        recipes.vrnn(X, Z, H, min_scale=value)


class Normalised(nn.Module):
    """Features through batch normalisation, whose running averages are buffers."""

    out_dim = H

    def __init__(self) -> None:
        super().__init__()
        self.in_dim, self.linear, self.norm = X, nn.Linear(X, H), nn.BatchNorm1d(H)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.norm(h.reshape(-1, H)).reshape(h.shape)


def normalised() -> recipes.Recipe:
    r = pair()
    with seeded(4):
        r.model.encode_x = Normalised()
    return r


def test_buffers_go_back_to_the_best_step_with_the_parameters() -> None:
    r, seen = normalised(), []
    norm = r.model.encode_x.norm

    def bound() -> float:
        seen.append(norm.running_mean.clone())
        return 1.0 if len(seen) == 2 else 0.0

    svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO())
    fit(svi, [batch()], steps=4, validation=Validation(bound, every=1), seed=0, progress=False)
    assert torch.equal(norm.running_mean, seen[1]) and not torch.equal(seen[1], seen[3])


def test_a_loss_that_has_been_trained_with_begins_its_ramp_again() -> None:
    loss, weights = ELBO(kl_weight=Ramp(0, 1)), []
    for steps in (4, 2):
        pyro.clear_param_store()
        history = fit(
            SVI(*parts(loss)), [batch()], steps=steps, records=Records(every=1), progress=False
        )
        weights.append([row["kl_weight"] for row in history.rows])
    assert weights == [[0.0, 0.25, 0.5, 0.75], [0.0, 0.5]]


def test_a_length_that_the_user_gave_spans_several_runs() -> None:
    loss = ELBO(kl_weight=Ramp(0, 1), clock=Clock(total=6))
    for _ in range(2):
        pyro.clear_param_store()
        fit(SVI(*parts(loss)), [batch()], steps=3, progress=False)
    assert (loss.clock.total, loss.clock.calls) == (6, 6)


def test_a_critic_that_no_hook_trains_is_refused() -> None:
    r = recipes.avrnn(X, Z, H, critic="feedforward", critic_dim=4, lipschitz="z")
    adversarial = Adversarial(r.critic, divergence=wasserstein(spectral()))
    loss = ELBO(penalties=[adversarial])
    svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    with pytest.raises(ValueError, match="the penalty 'critic' has a critic that no hook trains"):
        fit(svi, [batch()], steps=2, progress=False)
    fit(svi, [batch()], steps=2, hooks=[adversarial.update], progress=False)
    fit(svi, [batch()], steps=2, hooks=[lambda *args: adversarial.update(*args)], progress=False)


def test_a_learning_rate_has_one_owner() -> None:
    r = pair()
    clipped = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.99})
    with pytest.raises(ValueError, match="lr_schedule and lrd= of the optimiser would both"):
        fit(SVI(r.model, r.guide, clipped, ELBO()), [batch()], steps=2, lr_schedule=Ramp(1, 0))
    plateau = pyro.optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}}
    )
    with pytest.raises(NotImplementedError, match="ReduceLROnPlateau asks for a loss"):
        fit(SVI(r.model, r.guide, plateau, Trace_ELBO()), [batch()], steps=2)


def test_a_batch_without_a_frame_is_named() -> None:
    x, mask = batch()
    with pytest.raises(
        ValueError, match="every batch must have an observed frame; that of step 1 has none"
    ):
        fit(SVI(*parts()), [(x, mask & False)], steps=2, progress=False)


def test_folders_that_are_not_there_are_noticed_before_the_first_step(tmp_path: Path) -> None:
    path, calls = tmp_path / "none" / "file", []
    for options in ({"checkpoint": Checkpointing(path)}, {"records": Records(path)}):
        with pytest.raises(ValueError, match="folder that does not exist; make it first"):
            fit(SVI(*parts()), [batch()], steps=2, hooks=[lambda *_: calls.append(1)], **options)
    assert not calls


def test_the_mismatch_is_not_floored_and_the_rate_of_f_is_not_in_the_split() -> None:
    with seeded(2):
        r = recipes.dsae(X, Z, H, f_dim=3)
        x = torch.randn(12, 4, X)
        for p in r.guide.head.parameters():  # far from the prior of f
            p.data.mul_(4.0)
    mask = torch.ones(12, 4, dtype=torch.bool)
    found = [rate_split(r.model, r.guide, (x, mask), (x, mask), steps=2, seed=s) for s in range(8)]
    assert any(split.aggregate_mismatch_at_least < 0.0 for split in found)
    for split in found:  # the two add up to the rate, both as they are estimated
        total = split.information_at_most + split.aggregate_mismatch_at_least
        assert total == pytest.approx(split.rate, abs=1e-9)
    split = found[0]
    with seeded(9), torch.no_grad():
        d = r.model.rollout(r.guide, x, mask, num_particles=200)
    of_z = d.log_proposal - d.log_prior
    of_f = d.proposal_f.log_prob(d.f) - d.prior_f.log_prob(d.f)
    assert float(of_f.mean()) > 1.0  # else the two could not be told apart
    expected = float(of_z.sum(0).mean() - of_f.mean()) / 4
    assert split.rate == pytest.approx(expected, abs=0.35)
    assert abs(split.rate - float(of_z.sum(0).mean()) / 4) > 0.5 * float(of_f.mean()) / 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"length": [3, 2]}, "must be named x, lengths and split, got 'length'"),
        ({"x": np.arange(24).reshape(3, 4, 2)}, "x must be 0 and 1, or floating point numbers"),
    ],
)
def test_an_npz_that_would_be_misread_is_refused(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **({"x": np.zeros((3, 4, 2))} | arrays))
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "a.npz"))


def test_a_channel_that_is_constant_to_round_off_is_not_blown_up() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    x[..., 1] = 0.3
    x[0, 0, 1] = 0.1 + 0.2  # which is not 0.3
    splits = [Sequences(x, torch.ones(3, 4, dtype=torch.bool), ("a", "b", "c"))] * 3
    train, *_, std = standardise(*splits)
    assert std[1] == 1.0 and train.x[..., 1].abs().max() < 1e-6 and std[0] != 1.0
    x[..., 1] = 1e4 + torch.randn(3, 4, dtype=torch.float64)  # small, but no round-off
    assert standardise(*splits)[-1][1] != 1.0


def test_flipped_bits_of_a_parameter_file_are_noticed(tmp_path: Path) -> None:
    r, path = pair(), tmp_path / "r.pt"
    recipes.save(r, path)
    whole = path.read_bytes()
    before = {k: v.clone() for k, v in r.model.state_dict().items()}
    random = np.random.default_rng(0)
    for _ in range(40):
        at, bit = int(random.integers(len(whole))), int(random.integers(8))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
        try:
            found = recipes.load(path).model.state_dict()
        except ValueError as error:
            assert "or is damaged" in str(error)
        else:  # a bit that nothing reads
            assert all(torch.equal(found[k], v) for k, v in before.items())


def test_a_users_mask_of_calibration_is_checked() -> None:
    r = pair()
    with pytest.raises(ValueError, match="mask must be a prefix"):
        calibrate(r.model, r.guide, LEFT, num_simulations=100)
