"""Do latents help to model speech? Train an RNN and a VRNN, and score both on unseen utterances.

Source: Chung et al. (2015), https://arxiv.org/abs/1506.02216. The data are built in: 640 times
/ae/ by nine speakers, 7 to 29 frames of 12 features each (https://doi.org/10.24432/C5NS47).

Expect, in nats per frame (seed 0, 1,500 steps, one thread; about a minute):

    RNN   IWAE   0.66 ± 0.23  ELBO   0.66  KL  0.00
    VRNN  IWAE   1.55 ± 0.23  ELBO   0.87  KL  5.10
"""

import argparse
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from inference import ELBO, AdaptiveClip, Ramp, evaluate, fit, seeded
from pyro_avrnn import recipes
from pyro_avrnn.data import Batches, independent_baseline, vowels
from pyro_avrnn.generation import generate

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--smoke", action="store_true", help="20 steps, to see that it runs")
args = parser.parse_args()
torch.set_num_threads(1)  # the matrices are small: a second thread only costs time

# The data. Series differ in length, so a batch is padded, and the mask marks the real frames.
data = vowels()
x, mask = data.test.x, data.test.mask
print(f"test set: x {tuple(x.shape)} (series, steps, features), mask {tuple(mask.shape)}")
print(f"independent normals reach {independent_baseline(data):.2f}; nats per frame from here on")

# The models. The VRNN has a latent z_t of 8 numbers at every step; the RNN has none.
models = {
    "RNN": lambda: recipes.rnn(x_dim=12, h_dim=64),
    "VRNN": lambda: recipes.vrnn(x_dim=12, z_dim=8, h_dim=64),
}
for name, make in models.items():
    # A parameter store for each: Pyro would give the second model the parameters of the first.
    with pyro.get_param_store().scope(), seeded(0):
        r = make()  # r.model and r.guide are Pyro programs

        # With the full KL from the first step the model learns to ignore z. So the weight of the
        # KL rises from 0 to 1 over half of the run.
        loss = ELBO(kl_weight=Ramp(0, 1, over=0.5))
        fit(
            SVI(r.model, r.guide, pyro.optim.Adam({"lr": 2e-3}), loss),
            Batches(data.train, 64, seed=0),
            steps=20 if args.smoke else args.steps,
            # The best parameters on the validation set are kept, not the last ones.
            validation=(data.valid.x, data.valid.mask),
            clip_norm=AdaptiveClip(),
            seed=0,
            progress=name,
        )

        # The ELBO and IWAE are lower bounds of log p(x), and IWAE is the tighter one. The RNN has
        # nothing to integrate out: its bound is exact.
        found = evaluate(r.model, r.guide, x, mask, num_particles=64 if r.model.z_dim else 1)
        print(
            f"{name:5} IWAE {found.iwae_per_frame:6.2f} ± {found.iwae_per_frame_se:.2f}"
            f"  ELBO {found.elbo_per_frame:6.2f}  KL {found.kl_per_frame:5.2f}"
        )

# A Pyro program works with all of Pyro. This is Pyro's own ELBO, of one series and one draw.
with seeded(0):
    first = data.test.sequence(0)  # (T, 12), without padding
    print(f"Trace_ELBO of series 0: {-Trace_ELBO().loss(r.model, r.guide, first[None]):.1f} nats")

# The model also draws new series, and its file remembers the recipe.
print(f"two new series: {tuple(generate(r.model, size=2, length=20).shape)}")
Path("runs").mkdir(exist_ok=True)
recipes.save(r, "runs/vrnn.pt")
print("written: runs/vrnn.pt; 4_diagnose_in_arviz.py opens it")
