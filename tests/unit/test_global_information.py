"""Critics of pairs, bonuses for f, and what a guide of f is shown."""

from collections.abc import Callable
from typing import Any, cast

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from inference import ELBO, Adversarial, evaluate, fit, mmd, seeded
from inference.audit import audit
from inference.divergences import wasserstein
from inference.global_information import GlobalInformation, GlobalMatching
from inference.mutual_information import ESTIMATORS, infonce, scores_of_pairs
from inference.recurrent_probes import Paths, sequence_paths
from pyro_avrnn import recipes
from pyro_avrnn.models.dsae import normalised, shuffled_segments
from pyro_avrnn.pair_critics import ConditionalPairCritic, PairCritic
from tests.unit.table import observations, prefix_mask

LENGTHS = (6, 2, 4, 1)


def dsae(**options: Any) -> recipes.Recipe:
    given: dict[str, Any] = {"information": "infonce", "critic_dim": 8} | options
    return recipes.dsae(x_dim=3, z_dim=2, h_dim=5, f_dim=4, **given)


def data(r: recipes.Recipe) -> tuple[Tensor, Tensor]:
    return observations(r, len(LENGTHS), max(LENGTHS)), prefix_mask(LENGTHS)


def hook(r: recipes.Recipe, role: str = "information", **options: Any) -> Adversarial:
    assert r.critic is not None
    return Adversarial(r.critic, role=role, divergence=infonce(), **options)


# ---- critics ----


@pytest.mark.parametrize("critic", [PairCritic, ConditionalPairCritic])
@pytest.mark.parametrize("reads", ["path", "step"])
def test_a_score_is_that_of_its_pair_alone(critic: Callable[..., Any], reads: Any) -> None:
    torch.manual_seed(0)
    net = critic(2, 3, 8, reads=reads)
    z, f, mask = torch.randn(6, 2, 4, 2), torch.randn(2, 4, 3), prefix_mask(LENGTHS).t()[:, None]
    scores = net(z, f, mask)
    assert scores.shape == (1 if reads == "path" else 6, 2, 4, 4)
    for i, length in enumerate(LENGTHS):
        for j in range(4):
            alone = net(z[:length, 1:, i : i + 1], f[1:, j : j + 1], mask[:length, :, i : i + 1])
            kept = slice(None) if reads == "path" else slice(length)
            torch.testing.assert_close(scores[kept, 1, i, j], alone[:, 0, 0, 0])


def test_a_joint_critic_is_not_separable_and_scores_alike() -> None:
    torch.manual_seed(0)
    net = PairCritic(2, 3, 8, joint=True)
    z, f, mask = torch.randn(5, 1, 3, 2), torch.randn(1, 3, 3), torch.ones(5, 1, 3, dtype=bool)
    scores = net(z, f, mask)
    alone = net(z[:, :, 1:2], f[:, 2:], mask[:, :, :1])
    torch.testing.assert_close(scores[0, 0, 1, 2], alone[0, 0, 0, 0])
    with pytest.raises(ValueError, match="joint=True reads whole paths"):
        PairCritic(2, 3, 8, joint=True, reads="step")


def test_rows_hold_the_pair_apart_and_leave_none_as_it_was() -> None:
    scores = torch.arange(16.0).view(1, 4, 4)
    others, pairs = scores_of_pairs(scores, torch.tensor([[True, False, True, True]]))
    assert pairs.tolist() == [0.0, 10.0, 15.0]
    assert others.tolist() == [[1, 2, 3], [8, 9, 11], [12, 13, 14]]
    with pytest.raises(ValueError, match="at least 2 sequences for pairs to be shuffled"):
        scores_of_pairs(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))


# ---- the role ----


@pytest.mark.parametrize(("role", "moved"), [("information", True), ("information_of_z", False)])
def test_a_price_moves_whom_it_may(role: str, moved: bool) -> None:
    r = dsae(guide="factorised")  # which draws z without f
    d = r.model.rollout(r.guide, *data(r))
    price = hook(r, role).penalty(d)
    guide, critic = cast(Any, r.guide), cast(Any, r.critic)
    parts = [[*part.parameters()] for part in (guide.head, guide.local, critic)]
    of_f, of_z, of_critic = (
        [g for g in torch.autograd.grad(price, own, retain_graph=True, allow_unused=True)]
        for own in parts
    )
    assert any(g is not None and g.any() for g in of_f) == moved
    assert any(g is not None and g.any() for g in of_z)
    assert all(g is None for g in of_critic)  # it is a constant here


@pytest.mark.parametrize("reads", ["path", "step"])
def test_a_price_is_of_a_sequence_and_padding_says_nothing(reads: str) -> None:
    r = dsae(reads=reads)
    x, mask = data(r)
    with seeded(0):
        d = r.model.rollout(r.guide, x, mask)
    adversarial = hook(r)
    price = adversarial.penalty(d).detach()
    assert float(price) == pytest.approx(adversarial.distance(d) * 4 / sum(LENGTHS))
    spoilt = d._replace(z=d.z.where(d.mask.unsqueeze(-1), 1e6))
    assert float(adversarial.penalty(spoilt).detach()) == pytest.approx(float(price))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pairs_come_from_one_pass(estimator: str) -> None:
    """Each further step of the critic sees the same draws: two passes do not match."""
    seen = []
    r = dsae(information=estimator)
    critic: Any = r.critic
    handle = critic.register_forward_hook(lambda _, codes, scores: seen.append(codes))
    adversarial = Adversarial(
        critic, role="information", divergence=ESTIMATORS[estimator](), critic_steps=3
    )
    before = [p.clone() for p in (*r.model.parameters(), *r.guide.parameters())]
    metrics = adversarial.update(r.model, r.guide, *data(r))
    handle.remove()
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True))
    assert {"critic_loss", "critic_distance"} <= metrics.keys()
    after = [*r.model.parameters(), *r.guide.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def trained(steps: int, path: Any = None, resume: bool = False) -> list[Tensor]:
    from inference import Checkpointing

    pyro.clear_param_store()
    with seeded(0):
        r = dsae(normalise=True, segment=(0.3, 0.7))
        x, mask = data(r)
        adversarial = hook(r, watch=True, weight=2.0)
        loss = ELBO(
            penalties=[adversarial, GlobalInformation(), GlobalMatching(mmd())], kl_f_weight=0.5
        )
        svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
        history = fit(
            svi,
            [(x, mask)],
            steps=steps,
            hooks=[adversarial.update],
            seed=0,
            checkpoint=None if path is None else Checkpointing(path, 5, resume),
            progress=False,
        )
    row = history.rows[-1]
    for name in ("bound", "critic", "global_information", "global_matching"):
        assert row[f"{name}_pull"] > 0.0
    return [*r.model.parameters(), *r.guide.parameters(), *r.critic.parameters()]  # type: ignore[union-attr]


def test_a_run_goes_on_bit_for_bit(tmp_path: Any) -> None:
    whole = trained(10)
    with pytest.MonkeyPatch.context() as patch:
        stop: list[int] = []

        def interrupted(self: Any, *args: Any, **options: Any) -> Any:
            stop.append(1)
            if len(stop) == 8:
                raise KeyboardInterrupt
            return update(self, *args, **options)

        update = Adversarial.update
        patch.setattr(Adversarial, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(10, tmp_path / "c.pt")
    again = trained(10, tmp_path / "c.pt", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_the_past_of_an_image_is_its_first_rows() -> None:
    torch.manual_seed(0)
    r = recipes.pixelcnn_vae(x_dim=16, z_dim=3, channels=4, layers=2)
    x = torch.bernoulli(torch.full((5, 1, 16), 0.5))
    d = r.model.rollout(r.guide, x)
    pairs = Adversarial(PairCritic(4, 3, 8), role="information_of_past")._codes(d, d.z)
    assert pairs.z.shape == (4, 1, 5, 4)
    assert pairs.mask.shape == (4, 1, 5)
    assert pairs.mask[0].all()
    assert not pairs.mask[-1].any()
    torch.testing.assert_close(pairs.z[:, 0].transpose(0, 1), x.view(5, 4, 4))
    torch.testing.assert_close(pairs.f, d.z[0])
    assert GlobalInformation().information(d).isfinite()


# ---- bonuses ----


def test_a_smaller_weight_on_the_kl_of_f() -> None:
    r = dsae()
    x, mask = data(r)
    with seeded(0):
        d = r.model.rollout(r.guide, x, mask)
    kl: Tensor = (d.proposal_f.log_prob(d.f) - d.prior_f.log_prob(d.f))[0]
    plain, half = ELBO().objective(d, 0.5), ELBO(kl_f_weight=0.25).objective(d, 0.5)
    torch.testing.assert_close(half - plain, 0.75 * 0.5 * kl)


@pytest.mark.parametrize(("bits", "left"), [(1e-3, False), (1e3, True)])
def test_free_bits_of_f(bits: float, left: bool) -> None:
    r = dsae()
    d = r.model.rollout(r.guide, *data(r))
    bonus = GlobalInformation("free_bits", free_bits=bits).information(d)
    kl = (d.proposal_f.log_prob(d.f) - d.prior_f.log_prob(d.f)).mean()
    torch.testing.assert_close(bonus, kl - bits if left else torch.zeros(()))


# ---- what the guide is shown ----


def test_what_is_constant_along_a_sequence_is_taken_away() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6, 3), prefix_mask(LENGTHS)
    offset = 5.0 * torch.randn(4, 1, 3)
    found = normalised(x, mask)
    torch.testing.assert_close(normalised(x + offset, mask), found)
    torch.testing.assert_close(found[0].mean(dim=0), torch.zeros(3))
    variance = x[0].var(dim=0, correction=0)
    torch.testing.assert_close(found[0].var(dim=0, correction=0), variance / (variance + 0.01))
    assert not found[~mask].any()
    torch.testing.assert_close(normalised(x.where(mask[..., None], 1e6), mask), found)


def test_segments_are_pieces_in_another_order() -> None:
    torch.manual_seed(0)
    steps = torch.arange(6.0).expand(200, 6).unsqueeze(-1)
    mask = prefix_mask([6, 4] * 100)
    x, seen = shuffled_segments(steps, mask, 0.3, 0.7)
    counts, lengths = seen.sum(dim=1), mask.sum(dim=1)
    assert (counts >= (0.3 * lengths).ceil()).all()
    assert (counts <= (0.7 * lengths).ceil()).all()
    starts, ordered = set(), 0
    for row, count, length in zip(x[..., 0], counts.tolist(), lengths.tolist(), strict=True):
        kept = row[:count].tolist()
        assert sorted(kept) == list(range(int(min(kept)), int(min(kept)) + count))  # one stretch
        assert max(kept) < length
        starts.add(min(kept))
        ordered += kept == sorted(kept)
    assert len(starts) > 2
    assert ordered < 150


def test_only_training_shows_segments() -> None:
    r = dsae(segment=(0.3, 0.7))
    x, mask = data(r)
    guide: Any = r.guide
    guide.train()
    drawn = [guide.proposal_f(x, mask).mean for _ in range(2)]
    assert not torch.equal(*drawn)
    guide.eval()
    shown = [guide.proposal_f(x, mask).mean for _ in range(2)]
    assert torch.equal(*shown)


def test_only_z_is_read_from_what_is_normalised() -> None:
    torch.manual_seed(0)
    r = dsae(normalise=True)
    x, mask = data(r)
    guide: Any = r.guide
    torch.testing.assert_close(guide.encode(x + 3.0, mask), guide.encode(x, mask))
    assert not torch.allclose(guide.proposal_f(x + 3.0, mask).mean, guide.proposal_f(x, mask).mean)


# ---- paths and audit ----


def test_paths_are_of_one_pass_whatever_the_portions() -> None:
    r = dsae(guide="factorised")
    x, mask = data(r)
    found = sequence_paths(r.model, r.guide, x, mask, batch_size=4)
    assert found.f is not None
    assert found.f.shape == (4, 4)
    assert found.z.shape == (4, 6, 2)
    assert not found.z[~mask].any()
    portions = sequence_paths(r.model, r.guide, x, mask, batch_size=1)
    assert portions.z.shape == (4, 6, 2)


def test_an_audit_finds_what_is_there_and_nothing_else() -> None:
    torch.manual_seed(0)
    f, mask = torch.randn(600, 2), torch.ones(600, 3, dtype=torch.bool)
    told = f[:, None] + 0.7 * torch.randn(600, 3, 2)
    silent = torch.randn(600, 3, 2)
    for z, least, most in ((told, 0.6, 2.0), (silent, -0.3, 0.1)):
        parts = [(Paths(f[at], z[at]), mask[at]) for at in (slice(400), slice(400, None))]
        found = audit(PairCritic(2, 2, 16), *parts, steps=150, batch_size=64, seed=1)
        print(found)
        assert least < found.information < most
        assert found.ceiling == pytest.approx(torch.tensor(64.0).log().item())
    unlike = [
        (Paths(f[at], z[at]), mask[at])
        for at, z in ((slice(400), told), (slice(400, None), silent))
    ]
    assert audit(PairCritic(2, 2, 16), *unlike, steps=50, batch_size=64).information < 0.0


# ---- errors ----


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: dsae(information="mine"), "information must be one of density_ratio"),
        (lambda: dsae(segment=(0.7, 0.3)), "segment must be two shares of a sequence in order"),
        (lambda: GlobalInformation("kl"), "by must be one of infonce, free_bits"),
        (lambda: GlobalInformation(weight=-1.0), "weight must be at least 0"),
        (lambda: GlobalInformation("free_bits"), "free_bits goes with by='free_bits'"),
        (lambda: GlobalInformation(free_bits=1.0), "free_bits goes with by='free_bits'"),
        (lambda: GlobalMatching(mmd(), weight=-1.0), "weight must be at least 0"),
        (lambda: hook(dsae(), weight=-1.0), "weight must be at least 0"),
        (
            lambda: Adversarial(PairCritic(2, 3), role="information", divergence=wasserstein()),
            "role 'information' takes an estimator of mutual information",
        ),
        (
            lambda: Adversarial(
                PairCritic(2, 3), role="information", divergence=ESTIMATORS["club"]()
            ),
            "need a critic that is a density of f given z",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_models_without_f_are_refused() -> None:
    torch.manual_seed(0)
    r = recipes.vrnn(x_dim=3, z_dim=2, h_dim=5)
    x, mask = data(r)
    d = r.model.rollout(r.guide, x, mask)
    critic = PairCritic(2, 4, 8)
    for role in ("information", "information_of_z"):
        with pytest.raises(NotImplementedError, match="needs a model with a latent f"):
            Adversarial(critic, role=role).penalty(d)
    with pytest.raises(NotImplementedError, match="square images as sequences of one step"):
        Adversarial(critic, role="information_of_past").penalty(d)
    with pytest.raises(NotImplementedError, match="needs a model with a latent f"):
        GlobalInformation().penalty(d)
    with pytest.raises(NotImplementedError, match="kl_f_weight needs a model with a latent f"):
        ELBO(kl_f_weight=0.5).loss(d)
    with pytest.raises(ValueError, match="fitting must hold f"):
        codes = (sequence_paths(r.model, r.guide, x, mask), mask)
        audit(critic, codes, codes)


def test_a_batch_of_one_sequence_is_refused() -> None:
    r = dsae()
    x, mask = data(r)
    with pytest.raises(ValueError, match="at least 2 sequences for pairs to be shuffled"):
        hook(r).update(r.model, r.guide, x[:1], mask[:1])


def test_an_evaluation_leaves_information_to_the_audit() -> None:
    r = dsae()
    x, mask = data(r)
    with pytest.raises(ValueError, match=r"adversarial must compare codes of frames.*audit"):
        evaluate(r.model, r.guide, x, mask, num_particles=2, adversarial=hook(r))
