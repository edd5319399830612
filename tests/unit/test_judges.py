"""Recurrent probes, verification, DCI, f or z redrawn, the MSD methods, and images."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import seeded
from inference.recurrent_probes import RecurrentProbe
from inference.verification import DCI, dci, equal_error_rate
from pyro_avrnn import recipes
from pyro_avrnn.convolutions import ImageEmission, ImageFeatures, image_shape
from pyro_avrnn.exchange import redraw, swap_f
from pyro_avrnn.msd import MSDModel
from tests.unit.table import observations, prefix_mask

# ---- recurrent probes ----


def ordered(count: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Paths whose average says nothing: a bump that comes early, or late."""
    torch.manual_seed(0)
    mask = prefix_mask([8 + i % 3 for i in range(count)])
    late = torch.arange(count) % 2
    paths = 0.3 * torch.randn(count, mask.shape[1], 2)
    rows = torch.arange(count)
    paths[rows, 1 + 5 * late] += 3.0
    return paths, mask, np.array(["early", "late"])[late]


def test_a_recurrent_probe_reads_the_order_of_steps() -> None:
    paths, mask, labels = ordered(200)
    probe = RecurrentProbe(paths, mask, labels, width=8, epochs=12)
    again = RecurrentProbe(paths, mask, labels, width=8, epochs=12)
    longer = [
        torch.nn.functional.pad(part, pad) for part, pad in ((paths, (0, 0, 0, 3)), (mask, (0, 3)))
    ]
    torch.testing.assert_close(
        probe.log_probabilities(*longer), probe.log_probabilities(paths, mask)
    )
    found = probe.score(*ordered(60))
    assert found.accuracy > 0.95
    assert found.chance == 0.5
    spoilt = paths.where(mask.unsqueeze(-1), 1e6)
    assert (probe.predict(spoilt, mask) == probe.predict(paths, mask)).all()
    assert torch.equal(again.log_probabilities(paths, mask), probe.log_probabilities(paths, mask))
    shuffled = np.random.default_rng(0).permutation(labels)
    fooled = RecurrentProbe(paths, mask, shuffled, width=8, epochs=3)
    assert fooled.score(*ordered(60)).accuracy < 0.8


def test_a_probe_of_steps_reads_each_by_itself() -> None:
    torch.manual_seed(0)
    mask = prefix_mask([9, 6] * 40)
    steps = torch.randint(3, mask.shape)
    paths = torch.nn.functional.one_hot(steps, 3) + 0.1 * torch.randn(*mask.shape, 3)
    labels = (2 + steps).masked_fill(~mask, -7)  # classes are those of observed steps
    probe = RecurrentProbe(paths, mask, labels, width=8, epochs=20)
    assert probe.classes.tolist() == [2, 3, 4]
    assert probe.score(paths, mask, labels).accuracy > 0.95
    assert probe.log_probabilities(paths, mask).shape == (80, 9, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, m, y: (p[:9], m[:9], y[:9]), "at least ten sequences"),
        (lambda p, m, y: (p, m, y[:-1]), r"labels must have shape \(20,\)"),
        (lambda p, m, y: (p, m, np.zeros(20)), "two classes at least"),
        (lambda p, m, y: (p, m, None), r"labels must have shape \(20,\), one a code, got \(\)"),
        (lambda p, m, y: (p[..., 0], m, y), r"floating tensor \(N, T, D\)"),
        (lambda p, m, y: (p * float("nan"), m, y), "finite, got a NaN .* sequence 0"),
        (lambda p, m, y: (p, m[:, :-1], y), "mask must have shape"),
    ],
)
def test_a_probe_names_what_is_wrong(change: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RecurrentProbe(*change(*ordered(20)), epochs=1)


# ---- verification ----


def test_the_equal_error_rate_of_known_codes() -> None:
    random = np.random.default_rng(0)
    speakers = np.repeat(np.arange(8), 30)
    voices = np.eye(8)[speakers]
    assert equal_error_rate(voices, speakers).rate == 0.0
    noise = random.normal(size=(240, 8))
    assert equal_error_rate(noise, speakers).rate == pytest.approx(0.5, abs=0.03)
    rates = [equal_error_rate(voices + scale * noise, speakers).rate for scale in (0.1, 0.3, 1.0)]
    assert rates == sorted(rates)


def test_the_equal_error_rate_is_where_both_errors_meet() -> None:
    random = np.random.default_rng(1)
    codes, speakers = random.normal(size=(60, 3)), np.repeat(np.arange(6), 10)
    codes += 1.5 * random.normal(size=(6, 3))[speakers]
    found = equal_error_rate(codes, speakers)
    rows = codes - codes.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    alike = speakers == speakers[:, None]
    upper = np.triu(np.ones_like(alike), 1).astype(bool)
    refused = (cosines[alike & upper] <= found.threshold).mean()
    accepted = (cosines[~alike & upper] > found.threshold).mean()
    assert refused == pytest.approx(accepted, abs=0.02)
    assert min(refused, accepted) <= found.rate <= max(refused, accepted)
    assert (found.same, found.different) == (6 * 45, 60 * 59 // 2 - 6 * 45)


@pytest.mark.parametrize("speakers", [[1, 1, 1], [1, 2, 3]])
def test_verification_needs_pairs_of_both_kinds(speakers: list[int]) -> None:
    with pytest.raises(ValueError, match="speakers must be two at least"):
        equal_error_rate(np.eye(3), speakers)


def factors(mix: np.ndarray) -> DCI:
    random = np.random.default_rng(0)
    parts = []
    for count in (600, 200):
        labels = random.integers(4, size=(count, 2))
        codes = labels @ mix + 0.01 * random.normal(size=(count, mix.shape[1]))
        parts.append((codes, {"first": labels[:, 0], "second": labels[:, 1]}))
    return dci(*parts, trees=20)  # type: ignore[arg-type]


def test_dci_of_known_codes() -> None:
    apart = factors(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert min(apart.disentanglement, apart.completeness) > 0.9
    assert apart.informativeness > 0.99
    spread = factors(np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
    assert spread.disentanglement > 0.9  # a dimension tells of one factor
    assert spread.completeness == pytest.approx(0.5, abs=0.1)  # each factor by two
    mixed = factors(np.array([[1.0, 1.0], [4.0, -4.0]]))
    assert mixed.disentanglement < 0.5
    np.testing.assert_allclose(apart.importances.sum(axis=0), 1.0)


def test_dci_names_what_is_wrong() -> None:
    codes = np.zeros((4, 2))
    with pytest.raises(ValueError, match="heldout must have the factors of train"):
        dci((codes, {"a": [0, 1, 0, 1]}), (codes, {"b": [0, 1, 0, 1]}))
    with pytest.raises(ValueError, match="factor 'a' must be of two classes"):
        dci((codes, {"a": [0, 0, 0, 0]}), (codes, {"a": [0, 0, 0, 0]}))


# ---- emitted again ----


def dsae() -> recipes.Recipe:
    torch.manual_seed(0)
    return recipes.dsae(x_dim=3, z_dim=2, h_dim=5, f_dim=4)


def test_what_is_redrawn_comes_from_its_prior() -> None:
    r = dsae()
    x, mask = observations(r, 3, 5), prefix_mask([5, 2, 4])
    guide: Any = r.guide
    for what in ("f", "z"):
        with seeded(1):
            found = redraw(r.model, r.guide, x, what, mask)
        with seeded(2):
            other = redraw(r.model, r.guide, x, what, mask)
        assert found.shape == x.shape
        assert not found[~mask].any()
        assert not torch.equal(found, other)
    draws: list[Tensor] = []

    def kept(*args: Any, **options: Any) -> Any:
        draws.append(options.get("f"))
        return rollout(*args, **options)

    rollout = r.model.rollout
    with pytest.MonkeyPatch.context() as patch, seeded(3):
        patch.setattr(r.model, "rollout", kept)
        redraw(r.model, r.guide, x, "f", mask)
    assert draws[0] is None  # the guide's own z
    assert draws[1].shape == (1, 3, 4)
    with torch.no_grad():
        guide.head.net[-1].weight.mul_(1e-6)  # f of the guide: one narrow place
        guide.head.net[-1].bias.copy_(torch.tensor([5.0] * 4 + [-20.0] * 4))
        values = torch.stack([_f_of(r, x, mask) for _ in range(50)])
    assert values.mean().abs() < 0.5  # of the prior, not around 5
    with pytest.raises(ValueError, match="what must be one of f, z"):
        redraw(r.model, r.guide, x, "h", mask)
    with pytest.raises(ValueError, match="redraw needs a model with a latent"):
        v = recipes.vrnn(x_dim=3, z_dim=2, h_dim=5)
        redraw(v.model, v.guide, x, "f", mask)


def _f_of(r: recipes.Recipe, x: Tensor, mask: Tensor) -> Tensor:
    """The f that redraw emits with."""
    seen: list[Tensor] = []
    model: Any = r.model
    condition = model.condition
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "condition", lambda s, f: (seen.append(f), condition(s, f))[1])
        redraw(r.model, r.guide, x, "f", mask)
    return seen[-1]


# ---- MSD ----


def test_the_six_methods_of_the_benchmark() -> None:
    r = dsae()
    x = observations(r, 3, 5)
    adapter = MSDModel(r)
    assert adapter.latent_dim() == 6
    with seeded(0):
        latents = adapter.encode(x.view(3, 5, 3, 1, 1))
    assert latents.shape == (3, 5, 6)
    assert torch.equal(latents[:, 0, :4], latents[:, 4, :4])
    with seeded(0):
        assert torch.allclose(adapter.latent_vector(x), latents.mean(dim=1))
    with seeded(0):
        swapped = swap_f(r.model, r.guide, x, [1, 0, 2])
    one, other = adapter.swap_channels(latents[:1], latents[1:2], range(4))
    torch.testing.assert_close(adapter.decode(one), swapped[:1])
    torch.testing.assert_close(adapter.decode(other), swapped[1:2])
    assert torch.equal(one[..., 4:], latents[:1, :, 4:])
    drawn = adapter.sample(latents)
    assert drawn.shape == latents.shape
    assert torch.equal(drawn[:, 0, :4], drawn[:, 4, :4])
    assert adapter(x.view(3, 5, 3, 1)).shape == (3, 5, 3, 1)
    with pytest.raises(ValueError, match="a model with a latent f that all steps share"):
        MSDModel(recipes.vrnn(x_dim=3, z_dim=2, h_dim=5))


# ---- images ----


def test_images_are_read_and_emitted_by_convolutions() -> None:
    torch.manual_seed(0)
    for channels, side in ((3, 16), (1, 28), (3, 64)):
        x_dim = channels * side * side
        assert image_shape(x_dim) == (channels, side)
        reads, emits = ImageFeatures([x_dim, 7], channels=2), ImageEmission(5, x_dim, channels=2)
        x = torch.rand(2, 3, x_dim)
        assert reads(x).shape == (2, 3, 7)
        torch.testing.assert_close(reads(x)[1, 2], reads(x[1:, 2:])[0, 0])
        d = emits(torch.randn(2, 3, 4), torch.randn(2, 1, 1))
        assert d.batch_shape == (2, 3)
        assert d.event_shape == (x_dim,)
        assert ((d.mean > 0) & (d.mean < 1)).all()
    for wrong in (3 * 15 * 15, 3 * 6 * 6, 17):
        with pytest.raises(ValueError, match="a frame must be a square image"):
            ImageFeatures([wrong, 7])


def test_a_dsae_of_images_is_a_recipe(tmp_path: Any) -> None:
    options: dict[str, Any] = {"features": "image", "emission": "image"}
    r = recipes.dsae(x_dim=192, z_dim=2, h_dim=5, f_dim=4, **options)
    assert r.model.rollout(r.guide, torch.rand(2, 8, 192)).log_weight.shape == (8, 1, 2)
    recipes.save(r, tmp_path / "p.pt")
    assert recipes.load(tmp_path / "p.pt").config == r.config
