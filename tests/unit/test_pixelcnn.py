"""PixelCNN-VAE: a normalised density in raster order, exact draws from it, one step of Pyro."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Size, Tensor, nn
from torch.nn import functional as F

from inference import ELBO, FIVO, IWAE, evaluate
from pyro_avrnn import pixels as decoder
from pyro_avrnn.guides import NoLatents
from pyro_avrnn.models import ConvolutionalGuide, PixelCNN, PixelCNNVAE
from pyro_avrnn.priors import ConditionalNormal, StandardNormal
from pyro_avrnn.recipes import Recipe
from tests.unit.table import (
    assert_all_close,
    assert_close,
    gradients,
    prefix_mask,
    value_and_gradients,
)

Z = 2


def network(
    x_dim: int, z_dim: int = Z, layers: int = 3, scale: float = 0.5, cell: int = 2
) -> PixelCNN:
    """A small network with weights large enough that pixels and z matter to each other."""
    torch.manual_seed(5)
    made = PixelCNN(x_dim, z_dim, channels=4, layers=layers, first_kernel=3, maps=3, cell=cell)
    for p in made.parameters():
        nn.init.normal_(p, std=scale)
    return made


def pair(z_dim: int = Z) -> Recipe:
    """Model and guide of 3 x 3 images."""
    model = PixelCNNVAE(9, z_dim, decoder=network(9, z_dim))
    guide = ConvolutionalGuide(model, channels=3, c_dim=5) if z_dim else NoLatents(model)
    return Recipe(model, guide)


def pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(shape, generator=generator) < 0.4).double()


def every_image(x_dim: int) -> Tensor:
    """All of them, ``(2 ** X, X)``; the last pixel changes fastest."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * x_dim)


# autoregressive, without a blind spot


def dependence(logits: Callable[[Tensor], Tensor], side: int) -> Tensor:
    """(X, X) bool: whether the log-odds of pixel i move with pixel j, at any of four images."""
    jacobians = [torch.autograd.functional.jacobian(logits, x) for x in torch.rand(4, side * side)]
    return torch.stack(jacobians).ne(0.0).any(dim=0)


def wanted(side: int, reach: int) -> Tensor:
    """(X, X) bool: j comes before i and lies in the square of that reach around it."""
    row, column = (m.reshape(-1) for m in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    near = [(m[:, None] - m[None, :]).abs() <= reach for m in (row, column)]
    return near[0] & near[1] & torch.ones(side**2, side**2, dtype=torch.bool).tril(-1)


@pytest.mark.parametrize(("side", "layers"), [(1, 1), (2, 1), (6, 5), (7, 2), (8, 3)])
def test_a_pixel_sees_all_before_it_within_reach_and_nothing_else(side: int, layers: int) -> None:
    # small weights: a dead ReLU would hide a pixel
    net, z = network(side * side, layers=layers, scale=0.2), torch.randn(Z)
    seen = dependence(lambda x: net.logits(x, z), side)
    assert torch.equal(seen, wanted(side, reach=1 + layers - 1))


def test_that_check_finds_a_leak_and_a_blind_spot() -> None:
    net, z, side = network(36, layers=5, scale=0.2), torch.randn(Z), 6
    assert torch.equal(dependence(lambda x: net.logits(x, z), side), wanted(side, 5))
    leak = dependence(lambda x: net.logits(x, z) + 1e-9 * x, side)
    assert (leak & ~wanted(side, 5)).sum() == 36
    # one stack of masked 3 x 3 kernels, as of van den Oord, Kalchbrenner, Kavukcuoglu (2016)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    kernels = [torch.randn(1, 1, 3, 3) * mask]
    mask_b = mask.clone()
    mask_b[1, 1] = 1.0
    kernels += [torch.randn(1, 1, 3, 3) * mask_b for _ in range(4)]

    def one_stack(x: Tensor) -> Tensor:
        maps = x.reshape(1, 1, side, side)
        for kernel in kernels:
            maps = F.conv2d(maps, kernel, padding=1).tanh()
        return maps.reshape(-1)

    blind = dependence(one_stack, side)
    assert not (blind & ~wanted(side, 5)).any()
    assert (wanted(side, 5) & ~blind).any()


@pytest.mark.parametrize("cell", [4, 9])
def test_logits_are_those_of_masked_square_kernels(cell: int) -> None:
    """The network once more, with masks over whole kernels and z by a loop over layers."""
    net = PixelCNN(36, Z, channels=3, layers=3, kernel=3, first_kernel=5, maps=5, cell=cell)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    x, z = pixels(4, 36), torch.randn(4, Z)

    def square(convolution: nn.Module, kernel: int, vertical: bool, first: bool) -> Tensor:
        weight, r = convolution.weight, kernel // 2
        whole = torch.zeros(*weight.shape[:2], kernel, kernel)
        if vertical:
            whole[:, :, : r + (not first)] = weight
        else:
            whole[:, :, r, : r + (not first)] = weight[:, :, 0]
        return whole

    def gated(maps: Tensor) -> Tensor:
        half = maps.shape[1] // 2
        return maps[:, :half].tanh() * maps[:, half:].sigmoid()

    v = h = 2.0 * x.reshape(4, 1, 6, 6) - 1.0
    said = net.everywhere + (z @ net.of_z.weight.T).reshape(4, *net.everywhere.shape)
    biases = torch.zeros(3, 2, 4, 6, 6, 6)  # layers, stacks, N, 2C, rows, columns
    for row in range(6):
        for column in range(6):
            here = said[:, :, row // cell, column // cell] @ net.gates.weight[:, :, 0, 0].T
            biases[..., row, column] = here.reshape(4, 3, 2, 6).permute(1, 2, 0, 3)
    for i, layer in enumerate(net.layers):
        kernel, first = (5, True) if i == 0 else (3, False)
        bias_v, bias_h = biases[i]
        kernels = [
            square(c, kernel, c is layer.vertical, first)
            for c in (layer.vertical, layer.horizontal)
        ]
        v_maps = F.conv2d(v, kernels[0], layer.vertical.bias, padding=kernel // 2) + bias_v
        h_maps = F.conv2d(h, kernels[1], layer.horizontal.bias, padding=kernel // 2) + bias_h
        v = gated(v_maps)
        fresh = F.conv2d(
            gated(h_maps + F.conv2d(v, layer.down.weight)), layer.out.weight, layer.out.bias
        )
        h = fresh if first else h + fresh
    assert_close(net.logits(x, z), net.head(h).reshape(4, 36))


# a density


@pytest.mark.parametrize("z_dim", [0, Z])
def test_masses_of_all_images_sum_to_one(z_dim: int) -> None:
    emission = network(9, z_dim)(3.0 * torch.randn(4, z_dim))
    masses = emission.log_prob(every_image(9).unsqueeze(1)).exp()  # (512, 4)
    assert masses.max() > 0.01  # far from uniform
    torch.testing.assert_close(masses.sum(dim=0), torch.ones(4), rtol=1e-10, atol=0.0)
    moved = (masses - masses[:, :1]).abs().max()
    assert moved > 1e-3 if z_dim else moved == 0.0


def test_log_mass_is_the_sum_over_pixels_of_bernoullis() -> None:
    net, x, z = network(16), pixels(5, 16), torch.randn(5, Z)
    logits = torch.zeros(5, 16)
    for i in range(16):  # each from the pixels before it alone
        logits[:, i] = net.logits(torch.where(torch.arange(16) < i, x, 0.0), z)[:, i]
    expected = dist.Bernoulli(logits=logits).to_event(1).log_prob(x)
    assert_close(net(z).log_prob(x), expected)


def test_leading_dimensions_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, z = network(9), pixels(2, 1, 5, 9), torch.randn(2, 3, 5, Z)
    found = net(z).log_prob(x)
    assert found.shape == (2, 3, 5)
    one_by_one = [
        net(z[t, k, b]).log_prob(x[t, 0, b]) for t in range(2) for k in range(3) for b in range(5)
    ]
    assert_close(found, torch.stack(one_by_one).reshape(2, 3, 5))
    assert_close(net(z[0, 0, 0]).log_prob(x), net(z[0, 0, 0].expand(2, 1, 5, Z)).log_prob(x))
    monkeypatch.setattr(decoder, "_IMAGES_AT_ONCE", 4)  # portions that cut through K and B
    with torch.no_grad():
        assert_close(net(z).log_prob(x), found)


def test_copies_are_not_computed_again() -> None:
    net, x, z = network(9), pixels(2, 1, 5, 9), torch.randn(2, 3, 5, Z)
    counted: dict[str, list[int]] = {"first": [], "last": []}
    net.layers[0].vertical.register_forward_hook(lambda m, i, o: counted["first"].append(len(o)))
    net.head.register_forward_hook(lambda m, i, o: counted["last"].append(len(o)))
    net(z).log_prob(x)
    assert counted == {"first": [10], "last": [30]}  # the image is read once for its three z
    many = net(z[:, :1]).expand(Size((7, 2, 4, 5)))
    assert many.batch_shape == (7, 2, 4, 5) and many.event_shape == (9,)
    assert_close(many.log_prob(x), net(z[:, :1]).log_prob(x).expand(7, 2, 4, 5))
    assert counted["last"][1:] == [10, 10]
    without = network(9, z_dim=0)
    without.head.register_forward_hook(lambda m, i, o: counted["last"].append(len(o)))
    assert without(torch.zeros(2, 3, 5, 0)).log_prob(x).shape == (2, 3, 5)
    assert counted["last"][3:] == [10]


# draws


@pytest.mark.parametrize(
    ("x_dim", "layers", "cell"), [(1, 1, 1), (4, 2, 2), (25, 1, 3), (25, 3, 2), (25, 3, 8)]
)
@pytest.mark.parametrize("z_dim", [0, Z])
def test_draws_are_those_of_a_full_pass_for_every_pixel(
    x_dim: int, layers: int, cell: int, z_dim: int
) -> None:
    net, z = network(x_dim, z_dim, layers, cell=cell), torch.randn(6, z_dim)
    torch.manual_seed(1)
    found = net(z).sample()
    torch.manual_seed(1)
    x = torch.zeros(6, x_dim)
    for i in range(x_dim):
        x[:, i] = (torch.rand(6) < net.logits(x, z)[:, i].sigmoid()).double()
    assert torch.equal(found, x)


def test_draws_have_the_shapes_of_a_distribution_and_no_gradient() -> None:
    emission = network(9)(torch.randn(3, 1, Z, requires_grad=True))
    assert emission.sample().shape == (3, 1, 9)
    x = emission.expand(Size((3, 2))).sample(Size((200,)))
    assert x.shape == (200, 3, 2, 9) and not x.requires_grad and not emission.has_rsample
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert (x[:, :, 0] != x[:, :, 1]).any()  # copies draw for themselves


def worst_frequency(x: Tensor, masses: Tensor) -> float:
    """Largest error of the frequencies of all images, in standard errors."""
    values = (x * 2.0 ** torch.arange(x.shape[-1]).flip(0)).sum(dim=-1).long()
    frequencies = torch.bincount(values, minlength=len(masses)) / len(x)
    return ((frequencies - masses).abs() / (masses * (1 - masses) / len(x)).sqrt()).max().item()


@torch.no_grad()
def test_frequencies_of_draws_are_the_masses() -> None:
    net, z = network(4, scale=0.8), torch.tensor([-3.0, 2.0])
    nn.init.zeros_(net.head[-1].bias)
    x = net(z).sample(Size((40_000,)))
    masses = net(z).log_prob(every_image(4)).exp()
    assert masses.min() > 20 / len(x)  # enough of each for a normal error
    assert worst_frequency(x, masses) < 5.0
    # planted faults: rows and columns exchanged, and another z
    assert worst_frequency(x[:, [0, 2, 1, 3]], masses) > 10.0
    assert worst_frequency(x, net(-z).log_prob(every_image(4)).exp()) > 10.0


# one step of Pyro


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (2, 1, 3)], ids=["images", "ragged"])
@pytest.mark.parametrize("z_dim", [0, Z])
def test_rollout_says_what_the_loop_says(
    z_dim: int, lengths: tuple[int, ...], particles: int
) -> None:
    recipe, mask = pair(z_dim), prefix_mask(lengths)
    x = torch.where(mask[..., None], pixels(*mask.shape, 9), torch.nan)
    rolled = recipe.model.rollout(recipe.guide, x, mask, particles)

    def looped(program: Callable[..., None], names: str) -> Tensor:
        plate = pyro.plate("particles", particles, dim=-2) if particles > 1 else nullcontext()
        values = {f"z_{t + 1}": z if particles > 1 else z[0] for t, z in enumerate(rolled.z)}
        with plate:
            trace = poutine.trace(poutine.condition(program, values)).get_trace(x, mask)
        trace.compute_log_prob()
        sites = [trace.nodes.get(f"{names}_{t + 1}") for t in range(mask.shape[1])]
        shape = (particles, len(x))
        nothing = torch.zeros(shape)  # of a model without latents
        return torch.stack([nothing if s is None else s["log_prob"].expand(shape) for s in sites])

    weights = [torch.randn(mask.shape[1], particles, len(x)) for _ in range(3)]
    terms = {
        "log_prior": looped(recipe.model, "z"),
        "log_emission": looped(recipe.model, "x"),
        "log_proposal": looped(recipe.guide, "z"),
    }
    stacked = {name: getattr(rolled, name) for name in terms}
    assert_all_close(stacked, terms)
    given = recipe.model.rollout(recipe.guide, x, mask, z=rolled.z)
    assert_all_close({name: getattr(given, name) for name in terms}, terms)

    def mixed(parts: dict[str, Tensor]) -> Tensor:
        pairs = zip(weights, parts.values(), strict=True)
        return sum((w * part).sum() for w, part in pairs)

    assert_all_close(gradients(recipe, mixed(stacked)), gradients(recipe, mixed(terms)))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("z_dim", [0, Z])
def test_losses_are_pyros(z_dim: int, particles: int) -> None:
    recipe, x = pair(z_dim), pixels(4, 1, 9)
    kinds = [(ELBO(num_particles=particles), Trace_ELBO)]
    if z_dim:
        kinds.append((ELBO(num_particles=particles, analytic_kl=True), TraceMeanField_ELBO))
    for ours, theirs in kinds:
        settings = {"num_particles": particles, "vectorize_particles": particles > 1}
        value, found = value_and_gradients(recipe, ours, x, None)
        pyros = theirs(**settings, max_plate_nesting=1)
        expected_value, expected = value_and_gradients(recipe, pyros, x, None)
        assert_close(value, expected_value)
        assert_all_close(found, expected)


def test_without_latents_the_likelihood_is_exact() -> None:
    recipe, x = pair(0), pixels(4, 1, 9)
    exact = network(9, 0)(torch.zeros(4, 0)).log_prob(x[:, 0]).sum()
    for loss in (ELBO(), IWAE(num_particles=5)):
        assert_close(-loss(recipe.model, recipe.guide, x, None), exact)
    assert list(recipe.guide.parameters()) == []
    assert not any("of_z" in name for name, _ in recipe.model.named_parameters())


def test_importance_weights_average_to_the_evidence_of_a_grid() -> None:
    """One latent dimension, all of it on a grid: E[w] = p(x)."""
    model = PixelCNNVAE(9, 1, decoder=network(9, 1))
    guide, x = ConvolutionalGuide(model, 3, 5), pixels(1, 1, 9)
    grid = torch.linspace(-9.0, 9.0, 2001)
    with torch.no_grad():
        joint = dist.Normal(0.0, 1.0).log_prob(grid) + model.decoder(grid[:, None]).log_prob(x[0])
        evidence = joint.exp().sum() * (grid[1] - grid[0])
        w = (model.rollout(guide, x, num_particles=20_000).log_weight[0, :, 0]).exp() / evidence
    error = (w.std() / len(w) ** 0.5).item()
    assert error < 0.02
    assert abs(w.mean().item() - 1.0) < 5 * error
    wrong = w * 1.2  # a planted fault: a mass that does not sum to one
    assert abs(wrong.mean().item() - 1.0) > 5 * error


def test_images_of_a_sequence_are_independent_and_can_be_drawn() -> None:
    recipe, x = pair(), pixels(3, 2, 9)
    z = torch.randn(2, 4, 3, Z)
    both = recipe.model.rollout(recipe.guide, x, z=z).log_weight
    for t in range(2):
        alone = recipe.model.rollout(recipe.guide, x[:, t : t + 1], z=z[t : t + 1]).log_weight
        assert_close(both[t : t + 1], alone)
    drawn = recipe.model(None, torch.ones(3, 2, dtype=torch.bool))
    assert drawn.shape == (3, 2, 9) and bool(((drawn == 0) | (drawn == 1)).all())
    predicted = Predictive(recipe.model, guide=recipe.guide, num_samples=2)(x)
    assert predicted["z_1"].shape == (2, 3, Z)


def test_the_guide_owns_no_parameter_of_the_model_and_reads_each_image() -> None:
    recipe, x = pair(), pixels(3, 2, 9)
    assert not {id(p) for p in recipe.guide.parameters()} & {
        id(p) for p in recipe.model.parameters()
    }
    c = recipe.guide.encode(x, torch.ones(3, 2, dtype=torch.bool))
    assert c.shape == (3, 2, 5)
    assert_close(recipe.guide.encode(x[2:, 1:], torch.ones(1, 1, dtype=torch.bool)), c[2:, 1:])
    q = recipe.guide.proposal(recipe.model.init(Size((4, 3))), c[:, 0])
    assert q.batch_shape == (4, 3) and q.event_shape == (Z,)


def test_evaluation_and_single_precision_work() -> None:
    recipe = pair()
    recipe.model.float()
    recipe.guide.float()
    x, mask = pixels(6, 1, 9).float(), torch.ones(6, 1, dtype=torch.bool)
    assert recipe.model.decoder(torch.zeros(2, Z).float()).sample().dtype == torch.float32
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=25, fivo_particles=4)
    assert found.elbo_per_frame <= found.iwae_per_frame < 0.0
    assert math.isfinite(FIVO()(recipe.model, recipe.guide, x, mask).item())


def score(x: Tensor) -> object:
    recipe = pair()
    return recipe.model.rollout(recipe.guide, x)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: PixelCNN(783, Z),
            r"images must be square: x_dim .* got 783; .* 27 \* 27 and 784",
        ),
        (lambda: PixelCNN(0, Z), "x_dim must be at least 1, got 0"),
        (lambda: PixelCNN(9, -1), "z_dim must be at least 0, got -1"),
        (lambda: PixelCNN(9, Z, channels=0), "channels must be at least 1, got 0"),
        (lambda: PixelCNN(9, Z, layers=0), "layers must be at least 1, got 0"),
        (lambda: PixelCNN(9, Z, maps=0), "maps must be at least 1, got 0"),
        (lambda: PixelCNN(9, Z, cell=0), "cell must be at least 1, got 0"),
        (lambda: PixelCNN(9, Z, kernel=4), "kernel must be odd and at least 3, got 4"),
        (lambda: PixelCNN(9, Z, first_kernel=1), "first_kernel must be odd and at least 3, got 1"),
        (lambda: PixelCNNVAE(9, 3, decoder=network(9)), "width of z, got model: 3 .* decoder: 2"),
        (lambda: PixelCNNVAE(16, Z, decoder=network(9)), "width of x, got model: 16 .* 9"),
        (
            lambda: PixelCNNVAE(9, Z, decoder=network(9), prior=StandardNormal(3)),
            "width of z, got model: 2 and prior: 3",
        ),
        (
            lambda: PixelCNNVAE(9, Z, decoder=network(9), prior=ConditionalNormal(4, Z)),
            "got model: 0 and prior: 4",
        ),
        (
            lambda: ConvolutionalGuide(PixelCNNVAE(9, 0, decoder=network(9, 0))),
            "PixelCNNVAE has none .* use NoLatents",
        ),
        (lambda: score(pixels(2, 1, 9) / 2), "0 and 1 only"),
        (lambda: score(pixels(2, 9)), "add the batch dimension"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(build: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()
