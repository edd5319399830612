"""Does a critic replace the KL? One VRNN trained both ways on real speech, step by step.

This is what ``avrnn compare`` does, with the library's calls in plain sight. The data are 640
short series of a spoken vowel, built into the package.

Source: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496 (AVRNN); Chung et al. (2015),
https://arxiv.org/abs/1506.02216 (VRNN).

Expect, in nats per held-out frame (IWAE-64; 1,500 steps, about 3 minutes on one core): about
0.8 for an RNN without latents, 1.5 to 2.0 for the annealed ELBO. What the critic reaches, and
why, is in the table of RESULTS.md. Independent normals per dimension: -17.09.
"""

import argparse
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.infer import SVI

from inference import (
    ELBO,
    Adversarial,
    Ramp,
    RegularisedELBO,
    evaluate,
    fit,
    seeded,
    spectral,
    wasserstein,
)
from pyro_avrnn import recipes
from pyro_avrnn.data import Batches, independent_baseline, vowels

COLUMNS = ("iwae_per_frame", "elbo_per_frame", "kl_per_frame", "information_at_most")


def without_latents(x_dim: int) -> tuple[recipes.Recipe, Any, list[Any]]:
    """The yardstick: does z help at all?"""
    return recipes.rnn(x_dim, h_dim=64), ELBO(), []


def by_elbo(x_dim: int) -> tuple[recipes.Recipe, Any, list[Any]]:
    """The row to beat: the KL weight rises from 0 to 1 over half of the run."""
    return recipes.vrnn(x_dim, z_dim=8, h_dim=64), ELBO(kl_weight=Ramp(0, 1, over=0.5)), []


def by_critic(x_dim: int) -> tuple[recipes.Recipe, Any, list[Any]]:
    """No KL: a critic that sees z_t and h_t, 1-Lipschitz in z, prices the guide instead."""
    r = recipes.avrnn(
        x_dim,
        z_dim=8,
        h_dim=64,
        guide="filtering",
        view="conditional",
        critic="feedforward",
        lipschitz="z",
        activation="groupsort",
    )
    assert r.critic is not None
    adversarial = Adversarial(
        r.critic,
        view="conditional",
        divergence=wasserstein(spectral()),
        critic_steps=2,
        weight=Ramp(0, 30, over=0.5),
    )
    return r, RegularisedELBO([adversarial], kl_weight=0.0), [adversarial.update]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    steps = 20 if args.smoke else args.steps
    data = vowels()
    if args.smoke:
        data = replace(data, test=data.test.select(range(40)))
    print(f"independent normals per dimension: {independent_baseline(data):.2f} nats per frame")
    print(f"{'':<16}" + "".join(f"{name:>24}" for name in COLUMNS))
    for build in (without_latents, by_elbo, by_critic):
        # a store of its own: a second model must not be served the first one's tensors
        with pyro.get_param_store().scope(), seeded(args.seed):
            r, objective, hooks = build(data.x_dim)
            svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 2e-3}), objective)
            fit(
                svi,
                Batches(data.train, batch_size=64, seed=args.seed),
                steps=steps,
                hooks=hooks,  # the critic learns between SVI steps
                validation=(data.valid.x, data.valid.mask),
                validate_every=max(steps // 30, 1),
                clip_norm=5.0,
                seed=args.seed,
                description=build.__name__,
            )
            numbers = evaluate(
                r.model,
                r.guide,
                data.test.x,
                data.test.mask,
                num_particles=64,
                seed=args.seed,
                train=(data.train.x, data.train.mask) if r.model.z_dim else None,
            ).as_dict()
        cells = [numbers[name] for name in COLUMNS]
        row = "".join(f"{'-' if c is None else format(c, '.2f'):>24}" for c in cells)
        print(f"{build.__name__:<16}{row}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
