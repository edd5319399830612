"""Each model against its paper's equations written out in numpy; priors and guides likewise.

The references loop over sequences and steps in plain numpy, from the weights alone.
"""

import re
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from numpy import ndarray
from scipy.special import expit, log_softmax, logsumexp
from scipy.stats import norm
from torch import Tensor, nn

from inference import particle_filter
from inference.densities import StepDensities
from pyro_avrnn import guides, models, recipes
from pyro_avrnn.emissions import NormalEmission
from pyro_avrnn.guides import GUIDES, FilteringGuide, NoLatents, ResidualGuide
from pyro_avrnn.models import DMM, DSAE, RNN, SRNN, STORN, VAE, VRNN, GlobalGuide
from pyro_avrnn.networks import CELLS, GRU, MLP, RecurrentEncoder
from pyro_avrnn.priors import ConditionalNormal, FlowPrior, GatedNormal, MixturePrior
from pyro_avrnn.recipes import OF_DSAE, Recipe
from pyro_avrnn.sequence import SequenceModel
from tests.unit.table import (
    LATENT,
    MODELS,
    F,
    H,
    X,
    Z,
    assert_close,
    build,
    guides_of,
    observations,
    prefix_mask,
)

LENGTHS = (4, 2, 3)
K = 2

# the pieces, in numpy


def weights(module: nn.Module) -> dict[str, ndarray]:
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


def linear(layer: Any, v: ndarray) -> ndarray:
    w = weights(layer)
    return w["weight"] @ v + w["bias"]


def perceptron(net: Any, *inputs: ndarray, final: bool = False) -> ndarray:
    """Linear layers with ReLUs between them, and after the last one if ``final``."""
    v = np.concatenate(inputs)
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(layers):
        v = linear(layer, v)
        if final or i + 1 < len(layers):
            v = np.maximum(v, 0.0)
    return v


def softplus(v: ndarray) -> ndarray:
    return np.log1p(np.exp(v))


def log_normal(part: Any, value: ndarray, *inputs: ndarray) -> float:
    """A network whose output is the mean, and the scale as 0.001 + softplus(r + 1/2)."""
    loc, raw = np.split(perceptron(part.net, *inputs), 2)
    return float(norm.logpdf(value, loc, 1e-3 + softplus(raw + 0.5)).sum())


def gru(cell: Any, v: ndarray, h: ndarray) -> ndarray:
    """Cho et al. (2014), in torch's order of gates: reset, update, new."""
    w = weights(cell.cell)
    reset_x, update_x, new_x = np.split(w["weight_ih"] @ v + w["bias_ih"], 3)
    reset_h, update_h, new_h = np.split(w["weight_hh"] @ h + w["bias_hh"], 3)
    reset, update = expit(reset_x + reset_h), expit(update_x + update_h)
    return (1.0 - update) * np.tanh(new_x + reset * new_h) + update * h


def lstm(cell: Any, v: ndarray, h: ndarray, c: ndarray) -> tuple[ndarray, ndarray]:
    """Hochreiter and Schmidhuber (1997), in torch's order of gates: in, forget, cell, out."""
    w = weights(cell.cell)
    gates = w["weight_ih"] @ v + w["bias_ih"] + w["weight_hh"] @ h + w["bias_hh"]
    i, f, g, o = np.split(gates, 4)
    c = expit(f) * c + expit(i) * np.tanh(g)
    return expit(o) * np.tanh(c), c


Terms = list[tuple[float, float]]  # log p(z_t), log p(x_t) of each step of one sequence


def rnn(m: Any, x: ndarray, z: ndarray, f: ndarray | None) -> Terms:
    h, terms = np.zeros(H), []
    for x_t in x:
        terms.append((0.0, log_normal(m.decoder, x_t, h)))
        h = gru(m.cell, perceptron(m.encode_x, x_t, final=True), h)
    return terms


def vae(m: Any, x: ndarray, z: ndarray, f: ndarray | None) -> Terms:
    return [
        (float(norm.logpdf(z_t).sum()), log_normal(m.decoder, x_t, z_t))
        for x_t, z_t in zip(x, z, strict=True)
    ]


def storn(m: Any, x: ndarray, z: ndarray, f: ndarray | None) -> Terms:
    """Bayer and Osendorfer (2014), eq. 6: h_t has read x_{t-1} and z_t, and emits x_t."""
    h, seen, terms = np.zeros(H), np.zeros(H), []
    for x_t, z_t in zip(x, z, strict=True):
        prior = float(norm.logpdf(z_t).sum())
        h = gru(m.cell, np.concatenate([seen, perceptron(m.encode_z, z_t, final=True)]), h)
        terms.append((prior, log_normal(m.decoder, x_t, h)))
        seen = perceptron(m.encode_x, x_t, final=True)
    return terms


def vrnn(m: Any, x: ndarray, z: ndarray, f: ndarray | None) -> Terms:
    """Chung et al. (2015), eq. 5 to 7."""
    h, terms = np.zeros(H), []
    for x_t, z_t in zip(x, z, strict=True):
        phi_x, phi_z = (
            perceptron(net, v, final=True) for net, v in ((m.encode_x, x_t), (m.encode_z, z_t))
        )
        terms.append((log_normal(m.prior, z_t, h), log_normal(m.decoder, x_t, phi_z, h)))
        h = gru(m.cell, np.concatenate([phi_x, phi_z]), h)
    return terms


def srnn(m: Any, x: ndarray, z: ndarray, f: ndarray | None) -> Terms:
    """Fraccaro et al. (2016), eq. 3 and 4: d_t reads x_{<t} alone, z_t reads d_t and z_{t-1}."""
    d, before, terms = np.zeros(H), np.zeros(Z), []
    for x_t, z_t in zip(x, z, strict=True):
        terms.append((log_normal(m.prior, z_t, d, before), log_normal(m.decoder, x_t, z_t, d)))
        d, before = gru(m.cell, perceptron(m.encode_x, x_t, final=True), d), z_t
    return terms


def gated(prior: Any, z_t: ndarray, before: ndarray) -> float:
    """Krishnan et al. (2017), section 5: a gate between a linear and a nonlinear mean."""
    gate, proposed = expit(perceptron(prior.gate, before)), perceptron(prior.proposed, before)
    loc = (1.0 - gate) * linear(prior.linear, before) + gate * proposed
    scale = 1e-3 + softplus(linear(prior.scale, np.maximum(proposed, 0.0)))
    return float(norm.logpdf(z_t, loc, scale).sum())


def dmm(m: Any, x: ndarray, z: ndarray, f: ndarray | None) -> Terms:
    """Krishnan et al. (2017), eq. 4 and 5."""
    before, terms = weights(m)["z_0"], []
    for x_t, z_t in zip(x, z, strict=True):
        terms.append((gated(m.prior, z_t, before), log_normal(m.decoder, x_t, z_t)))
        before = z_t
    return terms


def dsae(m: Any, x: ndarray, z: ndarray, f: ndarray | None) -> Terms:
    """Li and Mandt (2018), section 2: p(f) prod p(z_t | z_<t) p(x_t | z_t, f)."""
    assert f is not None
    h, c, terms = np.zeros(H), np.zeros(H), []
    extra = float(norm.logpdf(f).sum())  # counted with step 1
    for x_t, z_t in zip(x, z, strict=True):
        terms.append((extra + log_normal(m.prior, z_t, h), log_normal(m.decoder, x_t, z_t, f)))
        h, c = lstm(m.cell, perceptron(m.encode_z, z_t, final=True), h, c)
        extra = 0.0
    return terms


REFERENCES: dict[str, Callable[[Any, ndarray, ndarray, ndarray | None], Terms]] = {
    "rnn": rnn,
    "vae": vae,
    "storn": storn,
    "vrnn": vrnn,
    "srnn": srnn,
    "dmm": dmm,
    "dsae": dsae,
}


def scored(model: SequenceModel, guide: Any) -> tuple[Tensor, Tensor, StepDensities]:
    """Lengths, data and densities of latents from anywhere."""
    x, mask = torch.randn(len(LENGTHS), max(LENGTHS), X), prefix_mask(LENGTHS)
    z = torch.randn(max(LENGTHS), K, len(LENGTHS), model.z_dim)
    f = torch.randn(K, len(LENGTHS), model.f_dim) if model.f_dim else None
    return x, mask, model.rollout(guide, x, mask, z=z, f=f)


def compare_with_the_equations(model: SequenceModel, guide: Any, reference: Any) -> None:
    x, mask, d = scored(model, guide)
    expected = torch.zeros(2, *d.log_prior.shape)
    for b, length in enumerate(LENGTHS):
        for k in range(K):
            f = None if d.f is None else d.f[k, b].numpy()
            terms = reference(model, x[b, :length].numpy(), d.z[:length, k, b].numpy(), f)
            expected[:, :length, k, b] = torch.tensor(terms).T
    assert_close(d.log_prior, expected[0], "log_prior")
    assert_close(d.log_emission, expected[1], "log_emission")


def shaken(recipe: Recipe) -> Recipe:
    """All parameters moved, so that none that starts at zero or at the identity hides."""
    with torch.no_grad():
        for p in (*recipe.model.parameters(), *recipe.guide.parameters()):
            p += 0.3 * torch.randn_like(p)
    return recipe


@pytest.mark.parametrize("name", REFERENCES)
def test_a_model_is_its_papers_equations(name: str) -> None:
    recipe = shaken(build(name))  # each recipe's own prior and cell
    compare_with_the_equations(recipe.model, recipe.guide, REFERENCES[name])


class RNNThatForgets(RNN):
    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        return super().advance(self.init(state.memory.shape[:-1]), z_t, x_t)


class VAEWithTheMeanOfFrames(VAE):
    def emission(self, z_t: Tensor, state: Any) -> dist.Distribution:
        return super().emission(
            z_t if z_t.ndim < 4 else z_t.mean(0, keepdim=True) + 0 * z_t, state
        )


class STORNThatEmitsBeforeReading(STORN):
    def emission(self, z_t: Tensor, state: Any) -> dist.Distribution:
        return self.decoder(self.cell.output(state.memory))


class VRNNWithoutFeedback(VRNN):
    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        return super().advance(state, z_t, torch.zeros_like(x_t))


class SRNNWithoutThePast(SRNN):
    def transition(self, state: Any) -> dist.Distribution:
        return super().transition(state._replace(z=torch.zeros_like(state.z)))


class DMMThatEmitsThePast(DMM):
    def emission(self, z_t: Tensor, state: Any) -> dist.Distribution:
        return self.decoder(state.z)


class DSAEThatForgetsF(DSAE):
    def prior_f(self, batch_shape: Any) -> dist.Distribution:
        f = super().prior_f(batch_shape)
        return dist.Normal(f.mean, 1.01 * f.stddev).to_event(1)


FAULTS = {
    "rnn": (RNNThatForgets, "log_emission"),
    "vae": (VAEWithTheMeanOfFrames, "log_emission"),
    "storn": (STORNThatEmitsBeforeReading, "log_emission"),
    "vrnn": (VRNNWithoutFeedback, "log_prior"),
    "srnn": (SRNNWithoutThePast, "log_prior"),
    "dmm": (DMMThatEmitsThePast, "log_emission"),
    "dsae": (DSAEThatForgetsF, "log_prior"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_equations_reject_another_model(name: str) -> None:
    recipe = shaken(build(name))
    recipe.model.__class__, term = FAULTS[name]  # the same parameters
    with pytest.raises(AssertionError, match=term):
        compare_with_the_equations(recipe.model, recipe.guide, REFERENCES[name])


# priors


def test_a_mixture_prior_is_scipys_mixture() -> None:
    prior = MixturePrior(H, Z, (4,), num_components=3)
    h, z = torch.randn(5, H), torch.randn(5, Z)
    found, mean = prior(h).log_prob(z), prior(h).mean
    for i in range(5):
        v = h[i].numpy()
        log_weight = log_softmax(perceptron(prior.weights, v))
        loc, raw = np.split(perceptron(prior.components.net, v), 2)
        loc, scale = loc.reshape(3, Z), (1e-3 + softplus(raw + 0.5)).reshape(3, Z)
        parts = norm.logpdf(z[i].numpy(), loc, scale).sum(axis=1)
        assert_close(found[i], torch.tensor(logsumexp(log_weight + parts)))
        assert_close(mean[i], torch.tensor(np.exp(log_weight) @ loc))
        uniform = logsumexp(parts) - np.log(3)  # the planted fault
        assert abs(found[i].item() - uniform) > 1e-6


@pytest.mark.parametrize("components", [1, 0, -1])
def test_a_mixture_of_less_than_two_normals(components: int) -> None:
    with pytest.raises(ValueError, match=f"num_components must be at least 2, got {components}"):
        MixturePrior(H, Z, num_components=components)
    options = {"num_components": components}
    with pytest.raises(ValueError, match="num_components must be at least 2.*ConditionalNormal"):
        recipes.vrnn(X, Z, H, prior="mixture", prior_options=options)
    with pytest.raises(ValueError, match="num_components must be at least 2"):
        recipes.rnn(X, H, "mixture", emission_options=options)


def flow_prior() -> tuple[FlowPrior, Tensor]:
    torch.manual_seed(2)
    prior = FlowPrior(H, 2, (8,), num_flows=2, min_scale=0.2)
    with torch.no_grad():
        for p in prior.parameters():
            p += 0.1 * torch.randn_like(p)
    return prior, torch.randn(H)


def grid() -> tuple[Tensor, float]:
    """Points ``(N, 2)`` and the area of each."""
    axis = torch.linspace(-24.0, 24.0, 961)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


def test_a_flow_priors_density_integrates_to_one() -> None:
    prior, h = flow_prior()
    z, area = grid()
    with torch.no_grad():
        total = prior(h.expand(len(z), -1)).log_prob(z).exp().sum() * area
        # the planted fault: the density of the base at the point, without the volume
        flow = prior(h.expand(len(z), -1))
        back = z
        for step in reversed(flow.transforms):
            back = step.inv(back)
        wrong = flow.base_dist.log_prob(back).exp().sum() * area
    assert abs(total - 1.0) < 1e-4
    assert abs(wrong - 1.0) > 1e-2


def errors_of_shares(drawn: Tensor, prior: FlowPrior, h: Tensor) -> Tensor:
    """Shares of draws in 16 bands of each coordinate against the density, in standard errors."""
    z, area = grid()
    with torch.no_grad():
        mass = prior(h.expand(len(z), -1)).log_prob(z).exp() * area
    found = []
    for i in range(2):
        edges = drawn[:, i].quantile(torch.arange(1, 16) / 16.0)
        # borders in the middle between grid points
        edges = (edges / area**0.5).floor() * area**0.5 + 0.5 * area**0.5
        expected = torch.zeros(16).index_add(0, torch.bucketize(z[:, i].contiguous(), edges), mass)
        counted = torch.bucketize(drawn[:, i].contiguous(), edges).bincount(minlength=16)
        error = (expected * (1 - expected) / len(drawn)).sqrt()
        found.append((counted / len(drawn) - expected) / error)
    return torch.stack(found)


def test_a_flow_priors_draws_have_its_density() -> None:
    prior, h = flow_prior()
    with torch.no_grad():
        drawn = prior(h.expand(40_000, -1)).sample()
        base = prior.base(h.expand(40_000, -1)).sample()
    assert errors_of_shares(drawn, prior, h).abs().max() < 5
    assert errors_of_shares(base, prior, h).abs().max() > 5  # the planted fault


# guides

FLOWS = [
    (model, prior, guide)
    for model in ("vae", "vrnn", "srnn", "dsae")
    for prior in ("conditional", "flow")
    for guide in ("flow", "smoothing_flow")
]


@pytest.mark.parametrize(("model", "prior", "guide"), FLOWS)
def test_what_a_flow_remembers_of_its_draw_is_its_density(
    model: str, prior: str, guide: str
) -> None:
    recipe = shaken(build(model, prior=prior, guide=guide))
    x, mask = observations(recipe, 3, 4), prefix_mask(LENGTHS)
    with torch.no_grad():
        drawn = recipe.model.rollout(recipe.guide, x, mask, num_particles=3)
        z, f = drawn.z.clone(), None if drawn.f is None else drawn.f.clone()
        again = recipe.model.rollout(recipe.guide, x, mask, z=z, f=f)
        other = recipe.model.rollout(recipe.guide, x, mask, z=z * (1 + 1e-6), f=f)
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(again.log_proposal, drawn.log_proposal, **tolerance)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other.log_proposal, drawn.log_proposal, **tolerance)


READS = [(model, guide) for model in LATENT for guide in guides_of(model)]


@pytest.mark.parametrize(("model", "guide"), READS)
def test_a_guide_says_whether_it_reads_the_future(model: str, guide: str) -> None:
    recipe = build(model, guide=guide)
    x = observations(recipe, 2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    later = torch.cat([x[:, :3], x[:, 3:] + 1.0], dim=1)
    reader: Any = recipe.guide.local if isinstance(recipe.guide, GlobalGuide) else recipe.guide
    c, other = reader.encode(x, mask), reader.encode(later, mask)
    assert torch.equal(c[:, :3], other[:, :3]) == (not reader.smoothing)
    assert not torch.equal(c[:, 3:], other[:, 3:])
    expected = guide in ("mean_field", "full") or guide.startswith("smoothing")
    assert reader.smoothing == expected


@pytest.mark.parametrize(("model", "guide"), READS)
def test_online_filtering_takes_guides_that_do_not_read_the_future(model: str, guide: str) -> None:
    recipe = build(model, guide=guide)
    x = observations(recipe, 2, 4)
    options: dict[str, Any] = {"num_particles": 3}
    with torch.no_grad():
        torch.manual_seed(7)
        offline = particle_filter(recipe.model, recipe.guide, x, **options)
        if recipe.guide.smoothing:
            sentence = f"guide {type(recipe.guide).__name__} reads x after step t .*cannot filter"
            with pytest.raises(ValueError, match=sentence):
                particle_filter(recipe.model, recipe.guide, x, online=True, **options)
        else:
            torch.manual_seed(7)
            online = particle_filter(recipe.model, recipe.guide, x, online=True, **options)
            assert torch.equal(online.log_evidence, offline.log_evidence)
        particle_filter(recipe.model, None, x, online=True, **options)  # the bootstrap filter
    assert recipe.guide.smoothing or model != "dsae"  # what proposes f has read all of x


@pytest.mark.parametrize("guide", [kind for kind in GUIDES.values() if kind[1] is None])
def test_a_guide_for_a_model_without_latents(guide: tuple[Any, Any]) -> None:
    model = build("rnn").model
    with pytest.raises(ValueError, match=rf"a {guide[0].__name__} proposes latents, but RNN has"):
        guide[0](model)


def test_the_guide_without_latents_for_a_model_that_has_them() -> None:
    with pytest.raises(ValueError, match=r"NoLatents proposes nothing, but VRNN has .*z_dim 2"):
        NoLatents(build("vrnn").model)


def test_a_shared_latent_needs_a_guide_that_proposes_it() -> None:
    model, vrnn_model = build("dsae").model, build("vrnn").model
    local = FilteringGuide(model, (4,))
    x = torch.randn(2, 3, X)
    sentence = "FilteringGuide does not propose the latent f .*wrap it in models.GlobalGuide"
    calls: list[Callable[[], Any]] = [
        lambda: model.rollout(local, x),
        lambda: local(x),
        lambda: particle_filter(model, local, x),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=sentence):
            call()
    sentence = r"but VRNN has none \(f_dim 0\); use FilteringGuide by itself"
    with pytest.raises(ValueError, match=sentence):
        GlobalGuide(vrnn_model, FilteringGuide(vrnn_model))


@pytest.mark.parametrize("shape", [None, (K, 3), (K + 1, 3, F), (1, 3, F)])
def test_given_latents_must_come_with_the_shared_one(shape: tuple[int, ...] | None) -> None:
    recipe = build("dsae")
    x, z = torch.randn(3, 4, X), torch.randn(4, K, 3, Z)
    f = None if shape is None else torch.randn(shape)
    with pytest.raises(ValueError, match=r"f must have shape \(K, B, F\) = \(2, 3, 2\)"):
        recipe.model.rollout(recipe.guide, x, z=z, f=f)


# sizes that disagree


def encode(size: int, out: int = H) -> MLP:
    return MLP([size, out], final=True)


W = 11  # a size that nothing has
#: constructor, and its parts as functions of what they read and give, in sizes that agree
SIZES: dict[str, tuple[Callable[..., SequenceModel], dict[str, Callable[..., Any]]]] = {
    "rnn": (
        lambda **parts: RNN(X, **parts),
        {
            "decoder": lambda i=H, o=X: NormalEmission(i, o),
            "cell": lambda i=H, o=H: GRU(i, o),
            "encode_x": lambda i=X, o=H: encode(i, o),
        },
    ),
    "vae": (
        lambda **parts: VAE(X, Z, **parts),
        {
            "prior": lambda i=1, o=Z: ConditionalNormal(i, o),
            "decoder": lambda i=Z, o=X: NormalEmission(i, o),
            "encode_x": lambda i=X: encode(i),
        },
    ),
    "storn": (
        lambda **parts: STORN(X, Z, **parts),
        {
            "prior": lambda i=H, o=Z: ConditionalNormal(i, o),
            "decoder": lambda i=H, o=X: NormalEmission(i, o),
            "cell": lambda i=2 * H, o=H: GRU(i, o),
            "encode_x": lambda i=X, o=H: encode(i, o),
            "encode_z": lambda i=Z, o=H: encode(i, o),
        },
    ),
    "vrnn": (
        lambda **parts: VRNN(X, Z, **parts),
        {
            "prior": lambda i=H, o=Z: ConditionalNormal(i, o),
            "decoder": lambda i=2 * H, o=X: NormalEmission(i, o),
            "cell": lambda i=2 * H, o=H: GRU(i, o),
            "encode_x": lambda i=X, o=H: encode(i, o),
            "encode_z": lambda i=Z, o=H: encode(i, o),
        },
    ),
    "srnn": (
        lambda **parts: SRNN(X, Z, **parts),
        {
            "prior": lambda i=H + Z, o=Z: ConditionalNormal(i, o),
            "decoder": lambda i=Z + H, o=X: NormalEmission(i, o),
            "cell": lambda i=H, o=H: GRU(i, o),
            "encode_x": lambda i=X, o=H: encode(i, o),
        },
    ),
    "dmm": (
        lambda **parts: DMM(X, Z, **parts),
        {
            "prior": lambda i=Z, o=Z: GatedNormal(i, o),
            "decoder": lambda i=Z, o=X: NormalEmission(i, o),
            "encode_x": lambda i=X: encode(i),
        },
    ),
    "dsae": (
        lambda **parts: DSAE(X, Z, F, **parts),
        {
            "prior": lambda i=H, o=Z: ConditionalNormal(i, o),
            "decoder": lambda i=Z + F, o=X: NormalEmission(i, o),
            "cell": lambda i=H, o=H: CELLS["lstm"](i, o),
            "encode_x": lambda i=X: encode(i),
            "encode_z": lambda i=Z, o=H: encode(i, o),
        },
    ),
}
WRONG = [
    (name, part, end)
    for name, (_, parts) in SIZES.items()
    for part, make in parts.items()
    for end in signature(make).parameters  # i, what it reads, and o, what it gives
]


@pytest.mark.parametrize(("name", "part", "end"), WRONG)
def test_parts_whose_sizes_disagree_are_named_with_their_sizes(
    name: str, part: str, end: str
) -> None:
    make, parts = SIZES[name]
    right = {one: made() for one, made in parts.items()}
    make(**right)  # agree
    with pytest.raises(ValueError) as caught:
        make(**right | {part: parts[part](**{end: W})})
    sentence = str(caught.value)
    said = re.fullmatch(
        r"parts must agree on the width of (.+), got (.+: \d+) and (.+: \d+); build them alike",
        sentence,
    )
    assert said, sentence
    sizes = re.findall(r"(\w+): (\d+)", sentence)
    assert len({size for _, size in sizes}) == 2, sentence
    # feature maps are named by what they make together
    named = " ".join(one for one, _ in sizes)
    assert part in named or (part.startswith("encode") and "features" in named), sentence


def test_an_encoder_for_features_of_another_width() -> None:
    model = build("vrnn").model
    with pytest.raises(ValueError, match=f"the features of x, got model: {H} and encoder: {W}"):
        FilteringGuide(model, encoder=RecurrentEncoder(W, 4))


def test_every_model_and_guide_is_in_the_tables() -> None:
    concrete = {
        kind.__name__
        for kind in vars(models).values()
        if isinstance(kind, type) and issubclass(kind, SequenceModel)
    }
    elsewhere = {"LGSSM", "PixelCNNVAE"}  # have test files of their own
    assert {type(build(name).model).__name__ for name in MODELS} == concrete - elsewhere
    assert set(guides_of("dsae")) == {*guides.GUIDES, *OF_DSAE}


@pytest.mark.parametrize(
    ("name", "part"),
    [("rnn", "prior"), ("rnn", "guide_options"), ("vae", "cell"), ("dmm", "cell")],
)
def test_a_part_that_a_model_does_not_have_is_named(name: str, part: str) -> None:
    sizes = {"x_dim": 3, "h_dim": 4} | ({} if name == "rnn" else {"z_dim": 2})
    with pytest.raises(TypeError, match=f"^{part} is no part of {name}; it takes activation, "):
        recipes.RECIPES[name](**sizes, **{part: "gru"})


def test_a_recipes_own_parts_are_those_of_its_paper() -> None:
    for name, own in recipes.OWN.items():
        sizes = {"x_dim": 3, "h_dim": 4} | ({} if name == "rnn" else {"z_dim": 2})
        plain, spelt = recipes.RECIPES[name](**sizes), recipes.RECIPES[name](**sizes, **own)
        assert plain.config == spelt.config and own.items() <= plain.config.items()


# what is read of a state


def test_guides_and_critics_read_all_of_a_state() -> None:
    """Also what is no output of a cell: x of the step before, z of the step before, f."""
    states = {
        "storn": models.STORNState(torch.randn(2, H), torch.randn(2, H)),
        "srnn": models.SRNNState(torch.randn(2, H), torch.randn(2, Z)),
        "dsae": models.DSAEState(torch.randn(2, 2 * H), torch.randn(2, F)),
    }
    for name, state in states.items():
        read = torch.cat([state[0][..., :H], state[1]], dim=-1)
        assert_close(build(name).model.hidden(state), read, name)


def test_a_prior_without_a_past_reads_one() -> None:
    model = build("vae", prior="conditional").model
    found = model.transition(model.init(torch.Size((2,))))
    expected, other = (model.prior(torch.full((2, 1), value)) for value in (1.0, 0.0))
    assert_close(found.mean, expected.mean)
    assert not torch.allclose(found.mean, other.mean)


def test_a_gated_transition_starts_as_the_identity_where_sizes_agree() -> None:
    square, other = GatedNormal(Z, Z).linear, GatedNormal(Z + 1, Z).linear
    assert torch.equal(square.weight, torch.eye(Z)) and not square.bias.any()
    assert other.bias.all()


def test_a_residual_guide_lets_gradients_reach_the_prior_where_they_are_wanted() -> None:
    model = build("vrnn").model
    guide, state = ResidualGuide(model, (4,)), model.init(torch.Size((2,)))
    weight = model.prior.net[-1].bias
    mean = guide.proposal(state, torch.randn(2, H)).mean
    assert torch.autograd.grad(mean.sum(), weight)[0].any()
    guide.prior_gradient = False
    mean = guide.proposal(state, torch.randn(2, H)).mean
    assert torch.autograd.grad(mean.sum(), weight, allow_unused=True) == (None,)
