"""Can a critic replace the KL? The annealed ELBO against a conditional critic, trained alike.

Sources: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496 (AVRNN); spectral normalisation,
Miyato et al. (2018), https://arxiv.org/abs/1802.05957; GroupSort, Anil et al. (2019),
https://arxiv.org/abs/1811.05381. Model and training are those of 1_train_and_evaluate.py.

Expect, in nats per frame (seed 0, 1,500 steps, one thread; about N minutes):

    ..

Next to the KL the critic ties; in place of it the critic loses a nat, since z then carries next to
nothing. Three seeds say the same (RESULTS.md).
"""

import argparse

import pyro
import torch
from pyro.infer import SVI

from inference import ELBO, Adversarial, Ramp, evaluate, fit, seeded, spectral, wasserstein
from pyro_avrnn import recipes
from pyro_avrnn.data import Batches, vowels

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--smoke", action="store_true", help="3 steps, to see that it runs")
args = parser.parse_args()
torch.set_num_threads(1)
data = vowels()

# A row is a KL weight and a critic's weight. Both of the latter were the best of four candidates
# on the validation set; the ELBO had as many.
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
        r = recipes.avrnn(
            **{"x_dim": 12, "z_dim": 8, "h_dim": 64, "guide": "filtering"},
            view="conditional",
            critic="feedforward",
            lipschitz="z",
            critic_activation="groupsort",
        )
        adversarial = Adversarial(
            r.critic, divergence=wasserstein(spectral()), critic_steps=2, weight=weight
        )
        # The guide pays the distance as a penalty; the hook trains the critic after each SVI step.
        penalties, hooks = ([adversarial], [adversarial.update]) if weight else ([], [])
        loss = ELBO(kl_weight=kl_weight, penalties=penalties)
        fit(
            SVI(r.model, r.guide, pyro.optim.Adam({"lr": 2e-3}), loss),
            Batches(data.train, 64, seed=0),
            steps=3 if args.smoke else args.steps,
            hooks=hooks,
            validation=(data.valid.x, data.valid.mask),
            clip_norm=5.0,
            seed=0,
            progress=name,
        )
        # Averaged over the data, the KL is information of z about x plus the mismatch of guide and
        # prior. A conditional critic prices the mismatch alone; the ELBO prices both.
        train = (data.train.x, data.train.mask)
        found = evaluate(r.model, r.guide, data.test.x, data.test.mask, train=train)
    print(
        f"{name:22} IWAE {found.iwae_per_frame:5.2f} ± {found.iwae_per_frame_se:.2f}"
        f"  ELBO {found.elbo_per_frame:5.2f}  KL {found.kl_per_frame:4.2f}"
        f" (information <= {found.information_at_most:4.2f},"
        f" mismatch >= {found.aggregate_mismatch_at_least:4.2f})",
        flush=True,
    )
