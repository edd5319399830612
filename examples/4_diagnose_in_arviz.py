"""What does the guide believe about one unseen utterance? Open its draws in ArviZ.

Source: LOO and its k-hat, Vehtari, Gelman and Gabry (2017), https://arxiv.org/abs/1507.04544. The
model is the VRNN that 1_train_and_evaluate.py wrote.

Expect (seed 0, 500 draws; 10 seconds):

    posterior deviation over prior deviation, by latent: 0.22 to 0.56, so every latent is used
    inside the 90 % interval: 92%
    LOO: k-hat above 0.63 in 19 of 19 frames, so ArviZ warns
"""

import argparse
import warnings
from pathlib import Path

import torch

from inference import to_arviz
from pyro_avrnn import plots, recipes
from pyro_avrnn.data import vowels

with warnings.catch_warnings():  # 0.23 announces its own refactoring
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", type=Path, default="runs/vrnn.pt", help="file of the first script")
parser.add_argument("--smoke", action="store_true", help="an untrained model, to see that it runs")
args = parser.parse_args()
torch.set_num_threads(1)
if args.smoke:
    r = recipes.vrnn(x_dim=12, z_dim=8, h_dim=64)
elif args.model.exists():
    r = recipes.load(args.model)
else:
    parser.error(f"{args.model} does not exist; run examples/1_train_and_evaluate.py first")
r.model.eval(), r.guide.eval()

# Draws of guide and model for one series without padding. They are one chain of independent
# draws, so R-hat has nothing to compare and is not reported.
data = vowels()
x = data.test.sequence(0)  # (T, 12)
Path("runs").mkdir(exist_ok=True)
to_arviz(r.model, r.guide, x, frame_seconds=data.frame_seconds).to_netcdf("runs/posterior.nc")

# From here on ArviZ alone: any of its functions reads this file.
posterior = az.from_netcdf("runs/posterior.nc")
print(az.summary(posterior, var_names=["z"], kind="stats").head(8))

# Is z used? Where the posterior is as wide as the prior, the guide learnt nothing from x.
narrower = posterior["posterior"]["z"].std("draw") / posterior["prior"]["z"].std("draw")
print("posterior deviation over prior deviation, by latent:")
print(narrower.mean(("chain", "time")).values.round(2))

# Does the model predict x? Nine in ten frames should lie inside the 90 % interval. That is a
# generous test: z_t has seen the frame that it predicts.
drawn = posterior["posterior_predictive"]["x"]
low, high = (drawn.quantile(q, ("chain", "draw")) for q in (0.05, 0.95))
inside = (low < posterior["observed_data"]["x"]) & (posterior["observed_data"]["x"] < high)
print(f"inside the 90 % interval: {float(inside.mean()):.0%}")

# Can LOO leave one frame out by reweighting the draws? Each z_t was drawn with its frame in sight,
# so the correction is large. Where k-hat exceeds ArviZ's limit it fails, and ArviZ warns.
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loo = az.loo(posterior, var_name="x", pointwise=True)
too_large = int((loo.pareto_k > loo.good_k).sum())
print(f"LOO: k-hat above {loo.good_k:.2f} in {too_large} of {len(x)} frames")
print(*{f"ArviZ warns: {one.message}" for one in caught if "Pareto" in str(one.message)})

plots.latent_posterior(posterior, "runs/posterior.png", title="Latents of one utterance")
print("written: runs/posterior.nc, runs/posterior.png")
