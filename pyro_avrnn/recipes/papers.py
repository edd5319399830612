"""Papers by name: functions that assemble model, guide and critic from parts.

Every part is an argument, given by its name or as a callable of your own: a cell ``(in_dim,
h_dim)``, a prior ``(h_dim, z_dim)``, an emission ``(in_dim, x_dim)``, a guide ``(model)``.

Example:
    >>> import torch
    >>> r = vrnn(x_dim=12, z_dim=8, h_dim=64, emission="normal")
    >>> x = torch.zeros(2, 5, 12)
    >>> r.model.rollout(r.guide, x, num_particles=4).log_weight.shape
    torch.Size([5, 4, 2])
"""

from collections.abc import Callable
from typing import Any, Unpack

from inference.protocols import one_of
from pyro_avrnn.guides import GUIDES, NoLatents
from pyro_avrnn.models import (
    DMM,
    DSAE,
    RNN,
    SRNN,
    STORN,
    VAE,
    VRNN,
    ConvolutionalGuide,
    GlobalGuide,
    PixelCNN,
    PixelCNNVAE,
)
from pyro_avrnn.pair_critics import Reads
from pyro_avrnn.recipes.build import (
    OF_DSAE,
    WITH_LATENTS,
    Builder,
    Part,
    Parts,
    Recipe,
    pick,
    plain_config,
)
from pyro_avrnn.recipes.with_critic import (
    RATIO_ROLES,
    information_critic,
    penalty_critic,
    ratio_critic,
    refined,
)
from pyro_avrnn.twists import FutureTwist


def vrnn(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """VRNN of Chung et al. (2015); with ``prior="standard"`` their VRNN-I.

    Args:
        x_dim: X, size of an observation.
        z_dim: Z, size of a latent.
        h_dim: H, width of the state and of every hidden layer.
        emission: "normal", "bernoulli", "mixture" (of normals), "categorical", "logistic"
            (discretised mixture of logistics, for mu-law speech), or your own.
        parts: prior, guide, cell and options, see :class:`Parts`.

    Raises:
        ValueError: an unknown part, or an option that a part does not take; the known ones are
            listed.
        TypeError: a part that this model does not have.
        NotImplementedError: parts that do not go together, such as a residual guide and a prior
            without a mean.
    """
    build = Builder("vrnn", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    made = build.parts("x z", prior=h_dim, decoder=2 * h_dim, cell=2 * h_dim)
    return build.recipe(VRNN(x_dim, z_dim, **made))


def rnn(x_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]) -> Recipe:
    """RNN without latents, whose guide is empty; arguments as for :func:`vrnn`."""
    build = Builder("rnn", parts, x_dim=x_dim, h_dim=h_dim, emission=emission)
    model = RNN(x_dim, **build.parts("x", decoder=h_dim, cell=h_dim))
    return Recipe(model, NoLatents(model), config=build.config)


def vae(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """VAE of every frame by itself (Kingma and Welling 2014); arguments as for :func:`vrnn`.

    A prior that would read the past reads a constant here.
    """
    build = Builder("vae", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    return build.recipe(VAE(x_dim, z_dim, **build.parts("x", prior=1, decoder=z_dim)))


def storn(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """STORN of Bayer and Osendorfer (2014); arguments as for :func:`vrnn`."""
    build = Builder("storn", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    made = build.parts("x z", prior=h_dim, decoder=h_dim, cell=2 * h_dim)
    return build.recipe(STORN(x_dim, z_dim, **made))


def srnn(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """SRNN of Fraccaro et al. (2016); arguments as for :func:`vrnn`."""
    build = Builder("srnn", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    made = build.parts("x", prior=h_dim + z_dim, decoder=z_dim + h_dim, cell=h_dim)
    return build.recipe(SRNN(x_dim, z_dim, **made))


def dmm(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """Deep Markov model of Krishnan et al. (2017); arguments as for :func:`vrnn`.

    Pyro's tutorial has ``guide="smoothing_flow"``. Dropout concerns the guide alone, as the model
    does not read x.
    """
    build = Builder("dmm", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    return build.recipe(DMM(x_dim, z_dim, **build.parts("x", prior=z_dim, decoder=z_dim)))


def dsae(
    x_dim: int,
    z_dim: int,
    h_dim: int,
    f_dim: int = 16,
    emission: Part = "normal",
    *,
    normalise: bool = False,
    segment: tuple[float, float] | None = None,
    information: str | None = None,
    critic_dim: int = 64,
    reads: Reads = "path",
    **parts: Unpack[Parts],
) -> Recipe:
    """DSAE of Li and Mandt (2018): a latent f of the whole sequence, and z_t.

    With ``information`` the recipe has a critic of pairs of f and z. It is trained, and lowers
    I(f; z), by ``Adversarial(critic, role="information", divergence=ESTIMATORS[information]())``,
    the adversary of Akuzawa et al. (2021), https://doi.org/10.1007/s10994-021-06032-4.

    Args:
        x_dim, z_dim, h_dim, emission: as for :func:`vrnn`.
        f_dim: F, size of the latent that all steps share.
        normalise, segment: what helps f and z apart without a critic, see
            :class:`~pyro_avrnn.models.GlobalGuide`.
        information: name of the estimator of I(f; z) that the critic is for, one of
            :data:`inference.mutual_information.ESTIMATORS`; None for no critic.
        critic_dim: width of its layers.
        reads: what of z it reads, "path" or "step".
        parts: as for :func:`vrnn`; the guide of z may also be one of the paper's two, "full"
            (reads all of x, and f; the default) or "factorised" (reads x_t alone).
    """
    sizes = {"x_dim": x_dim, "z_dim": z_dim, "h_dim": h_dim, "f_dim": f_dim}
    build = Builder("dsae", parts, **sizes, emission=emission)
    made = build.parts("x z", prior=h_dim, decoder=z_dim + f_dim, cell=h_dim)
    model = DSAE(x_dim, z_dim, f_dim, **made)
    guide_of_z = build.guide(model, GUIDES | OF_DSAE)
    structure: dict[str, Any] = {"normalise": normalise, "segment": segment}
    guide = GlobalGuide(model, guide_of_z, rnn_dim=h_dim, **structure)
    of_critic = {"information": information, "critic_dim": critic_dim, "reads": reads}
    critic = None
    if information is not None:
        critic = information_critic(z_dim, f_dim, information, critic_dim, reads)
    config = {**build.config, **structure, **(of_critic if information is not None else {})}
    return Recipe(model, guide, critic, config)


def pixelcnn(x_dim: int, *, channels: int = 32, layers: int = 5) -> Recipe:
    """PixelCNN of van den Oord et al. (2016): a binary image by its own past, without a latent.

    Args:
        x_dim: X, pixels of an image, a square number; an image is a sequence of one step.
        channels: maps of each of the two stacks.
        layers: of gated convolutions.

    Raises:
        ValueError: images that are not square, or a size below 1.
    """
    given = {"x_dim": x_dim, "channels": channels, "layers": layers}
    config = plain_config("pixelcnn", given)
    model = PixelCNNVAE(x_dim, 0, decoder=PixelCNN(x_dim, 0, channels=channels, layers=layers))
    return Recipe(model, NoLatents(model), config=config)


def pixelcnn_vae(x_dim: int, z_dim: int, *, channels: int = 32, layers: int = 5) -> Recipe:
    """PixelCNN-VAE (Gulrajani et al. 2017; Chen et al. 2017): a latent for the whole image.

    Args:
        x_dim, channels, layers: as for :func:`pixelcnn`.
        z_dim: Z, size of the latent.

    Raises:
        ValueError: images that are not square, or a size below 1.
    """
    given = {"x_dim": x_dim, "z_dim": z_dim, "channels": channels, "layers": layers}
    config = plain_config("pixelcnn_vae", given)
    decoder = PixelCNN(x_dim, z_dim, channels=channels, layers=layers)
    model = PixelCNNVAE(x_dim, z_dim, decoder=decoder)
    return Recipe(model, ConvolutionalGuide(model), config=config)


def avrnn(
    x_dim: int,
    z_dim: int,
    h_dim: int,
    emission: Part = "normal",
    *,
    base: str = "vrnn",
    role: str = "penalty",
    view: str = "conditional",
    critic: str = "lstm",
    critic_dim: int = 64,
    critic_activation: str = "relu",
    lipschitz: str | None = None,
    window: int = 4,
    num_candidates: int = 16,
    **parts: Any,
) -> Recipe:
    """AVRNN of Huang and Xiao (2021), https://arxiv.org/abs/2108.04496: a model with a critic.

    In the paper the critic's score is a penalty on guide and prior. With ``role="refine"`` it is
    part of the prior, see :class:`~pyro_avrnn.refinement.RefinedPrior`; ``num_candidates`` and
    ``critic_dim`` then say all about it. With ``role="twist"`` it is the twist of a filter, see
    :class:`~pyro_avrnn.twists.FutureTwist`, of width ``critic_dim``. With ``role="ratio"`` or
    ``"ratio_to_prior"`` it stands in the bound for the density of an implicit guide, see
    :class:`inference.AVB`.

    Args:
        x_dim, z_dim, h_dim, emission: as for :func:`vrnn`.
        base: the model; the paper's is "vrnn", any other recipe with latents will do.
        role: what the critic is for: penalty, refine, twist, ratio or ratio_to_prior.
        view: what the critic sees: marginal, trajectory, trajectory_redrawn, conditional, joint.
        critic: "lstm", the paper's, or "feedforward".
        critic_dim: width of the critic's layers.
        critic_activation: of a feed-forward critic, "relu" or "groupsort".
        lipschitz: for a feed-forward critic, spectral normalisation in "z" or in "all" it sees.
        window: for a feed-forward critic whose view shows a path, how many codes of it are seen.
        num_candidates: S of a refined prior.
        parts: of the base, see :class:`Parts`. A VRNN's guide is by default the paper's, which
            uses the mean of the prior and gives it no gradient: ``guide="residual"``,
            ``prior_gradient=False``; that of a ratio is "implicit".

    Raises:
        ValueError: an unknown part; the known ones are listed.
        NotImplementedError: spectral normalisation of an LSTM critic.
    """
    one_of(("penalty", "refine", "twist", *RATIO_ROLES), role=role)
    own: dict[str, Any] = {"critic_dim": critic_dim, "view": view, "critic": critic}
    own |= {"critic_activation": critic_activation, "lipschitz": lipschitz, "window": window}
    if base == "vrnn" and role == "penalty":
        parts = {"guide": "residual", "prior_gradient": False} | parts
    if role in RATIO_ROLES:
        parts = {"guide": "implicit"} | parts
    recipe = pick("base", base, {name: RECIPES[name] for name in WITH_LATENTS})
    made = recipe(x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission, **parts)
    if role == "refine":
        return refined(made, num_candidates=num_candidates, critic_dim=critic_dim)
    if role == "penalty":
        network = penalty_critic(made.model, **own)
    else:
        own = {"critic_dim": critic_dim}
        network = (
            FutureTwist(made.model, critic_dim)
            if role == "twist"
            else ratio_critic(made, critic_dim)
        )
    config = plain_config("avrnn", {**made.config, "base": base, "role": role, **own})
    return Recipe(made.model, made.guide, network, config)


RECIPES: dict[str, Callable[..., Recipe]] = {
    "rnn": rnn,
    "vae": vae,
    "storn": storn,
    "vrnn": vrnn,
    "avrnn": avrnn,
    "srnn": srnn,
    "dmm": dmm,
    "dsae": dsae,
    "pixelcnn": pixelcnn,
    "pixelcnn_vae": pixelcnn_vae,
}
