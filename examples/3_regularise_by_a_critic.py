"""Can a critic replace the KL? The annealed ELBO against a conditional critic, trained alike.

Sources: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496 (AVRNN); spectral normalisation,
Miyato et al. (2018), https://arxiv.org/abs/1802.05957; GroupSort, Anil et al. (2019),
https://arxiv.org/abs/1811.05381. Model and training are those of 1_train_and_evaluate.py.

Expect, in nats per frame (seed 0, 1,500 steps, one thread; four minutes):

    annealed ELBO          IWAE  1.55 ± 0.23  ELBO  0.87  KL 5.10
    critic next to the KL  IWAE  1.48 ± 0.24  ELBO  0.74  KL 5.44
    critic, no KL          IWAE  1.07 ± 0.24  ELBO  1.02  KL 0.05

Next to the KL the critic ties: 0.1 less is within the standard error. In place of the KL it loses
half a nat, because z then carries almost nothing. Three seeds in RESULTS.md say the same.
"""

import argparse

import pyro
import torch
from pyro.infer import SVI

from inference import ELBO, Adversarial, Ramp, evaluate, fit, seeded, spectral, wasserstein
from inference.clipping import AdaptiveClip
from pyro_avrnn import recipes
from pyro_avrnn.data import Batches, vowels

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--smoke", action="store_true", help="3 steps, to see that it runs")
args = parser.parse_args()
torch.set_num_threads(1)
data = vowels()
steps, test = (3, data.test.select(range(20))) if args.smoke else (args.steps, data.test)
model = {"x_dim": 12, "z_dim": 8, "h_dim": 64, "guide": "filtering"}  # that of the first script
critic = {"critic": "feedforward", "lipschitz": "z", "critic_activation": "groupsort"}

# A row is a weight of the KL and one of the critic. The critic's weights are the best of four on
# the validation set, and so is the ramp of the ELBO.
annealed = Ramp(0, 1, over=0.5)
rows = {
    "annealed ELBO": (annealed, 0.0),
    "critic next to the KL": (annealed, Ramp(0, 0.3, over=0.5)),
    "critic, no KL": (0.0, 30.0),
}
for name, (kl_weight, weight) in rows.items():
    with pyro.get_param_store().scope(), seeded(0):
        # The critic scores z_t given h_t: draws of the prior high, draws of the guide low. It is
        # 1-Lipschitz in z, so the gap between the two is a Wasserstein distance.
        r = recipes.avrnn(**model, view="conditional", **critic)
        distance = wasserstein(spectral())
        adversarial = Adversarial(r.critic, divergence=distance, critic_steps=2, weight=weight)
        # The guide pays the distance as a penalty; the hook trains the critic after each SVI step.
        penalties, hooks = ([adversarial], [adversarial.update]) if weight else ([], [])
        loss = ELBO(kl_weight=kl_weight, penalties=penalties)
        fit(
            SVI(r.model, r.guide, pyro.optim.Adam({"lr": 2e-3}), loss),
            Batches(data.train, 64, seed=0),
            steps=steps,
            hooks=hooks,
            validation=(data.valid.x, data.valid.mask),
            clip_norm=AdaptiveClip(),
            seed=0,
            progress=name,
        )
        # Averaged over the data, the KL is information of z about x plus the mismatch of guide and
        # prior. A conditional critic prices the mismatch alone; the ELBO prices both.
        train = (data.train.x, data.train.mask)
        found = evaluate(r.model, r.guide, test.x, test.mask, train=train)
    print(
        f"{name:22} IWAE {found.iwae_per_frame:5.2f} ± {found.iwae_per_frame_se:.2f}"
        f"  ELBO {found.elbo_per_frame:5.2f}  KL {found.kl_per_frame:4.2f}"
        f" (information <= {found.information_at_most:4.2f},"
        f" mismatch >= {found.aggregate_mismatch_at_least:4.2f})",
        flush=True,
    )
