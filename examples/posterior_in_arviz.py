"""What does the guide believe about one held-out sequence? Open it in ArviZ.

Source: the sequence model is the VRNN of Chung et al. (2015), https://arxiv.org/abs/1506.02216;
k-hat of LOO is that of Vehtari, Gelman and Gabry (2017), https://arxiv.org/abs/1507.04544.

Trains a VRNN by the annealed ELBO (30 s on one core), writes ``posterior.nc``, reads it back
with ``arviz.from_netcdf`` and prints a summary, a posterior-predictive check and LOO. Expect
LOO to warn: the log-likelihood is log p(x_t | z_t, h_t) under draws of q, and each frame's own
z_t has seen that frame, so leaving the frame out changes its posterior a lot and k-hat is large.
R-hat is not reported: the draws of one guide are one chain, independent by construction.
"""

import argparse
import warnings
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI

from inference import ELBO, Ramp, fit, seeded, to_arviz
from pyro_avrnn import recipes
from pyro_avrnn.data import Batches, vowels

matplotlib.use("Agg")
with warnings.catch_warnings():  # 0.23 announces its own refactoring
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("runs/arviz"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    steps = 20 if args.smoke else args.steps
    args.out.mkdir(parents=True, exist_ok=True)
    data = vowels()
    with pyro.get_param_store().scope(), seeded(0):
        r = recipes.vrnn(x_dim=data.x_dim, z_dim=8, h_dim=64)
        svi = SVI(
            r.model, r.guide, pyro.optim.Adam({"lr": 2e-3}), ELBO(kl_weight=Ramp(0, 1, over=0.5))
        )
        fit(
            svi,
            Batches(data.train, batch_size=64),
            steps=steps,
            validation=(data.valid.x, data.valid.mask),
            validate_every=max(steps // 30, 1),
            clip_norm=5.0,
            seed=0,
        )
        x = data.test.sequence(0)  # (T, X), no padding
        to_arviz(r.model, r.guide, x, draws=500).to_netcdf(str(args.out / "posterior.nc"))

    posterior = az.from_netcdf(str(args.out / "posterior.nc"))
    print(posterior)
    print(az.summary(posterior, var_names=["z"], kind="stats").head(10))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loo = az.loo(posterior, var_name="x", pointwise=True)
    print(loo)
    for warning in caught:
        if "Pareto" in str(warning.message):
            print(f"as expected, LOO warns: {warning.message}")
    if hasattr(az, "plot_ppc"):
        axes = az.plot_ppc(posterior, var_names=["x"], num_pp_samples=50, random_seed=0)
        figure = axes.figure if hasattr(axes, "figure") else axes.flat[0].figure
        figure.suptitle("Posterior predictive: all features of one sequence, given draws of q")
        figure.savefig(args.out / "posterior_predictive.png", dpi=130)
    else:  # arviz 1.x
        az.plot_ppc_dist(posterior).savefig(str(args.out / "posterior_predictive.png"))
    print(f"written: {args.out / 'posterior.nc'}, {args.out / 'posterior_predictive.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
