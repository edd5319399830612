"""What does another prior, guide, cell, emission or model change? Each is one argument.

Sources: flow prior, Dinh et al. (2017), https://arxiv.org/abs/1605.08803; smoothing guide,
Krishnan et al. (2017), https://arxiv.org/abs/1609.09869; SRNN, Fraccaro et al. (2016),
https://arxiv.org/abs/1605.07571. The training is that of 1_train_and_evaluate.py.

Expect, in nats per frame (seed 0, 600 steps, one thread; three minutes):

    as before          IWAE  1.56 ± 0.23  ELBO  0.97  KL 2.83
    prior: flow        IWAE  1.76 ± 0.23  ELBO  1.15  KL 2.84
    prior: your own    IWAE  1.51 ± 0.23  ELBO  1.03  KL 1.12
    guide: smoothing   IWAE  1.64 ± 0.23  ELBO  1.05  KL 2.47
    cell: LSTM         IWAE  0.90 ± 0.23  ELBO  0.28  KL 2.40
    emission: mixture  IWAE  1.47 ± 0.24  ELBO  0.96  KL 1.85
    model: SRNN        IWAE  1.66 ± 0.23  ELBO  1.28  KL 1.25

So few steps of one seed show how to swap a part, not which part is best: most differences lie
within the standard error. RESULTS.md has every prior with every guide.
"""

import argparse

import pyro
import torch
from pyro.infer import SVI

from inference import ELBO, AdaptiveClip, Ramp, evaluate, fit, seeded
from pyro_avrnn import recipes
from pyro_avrnn.data import Batches, vowels


class UnitPrior(torch.nn.Module):
    """A part of your own: p(z_t | h) with a learnt mean and a scale of 1."""

    def __init__(self, h_dim: int, z_dim: int) -> None:
        super().__init__()
        self.h_dim, self.z_dim = h_dim, z_dim  # lets a recipe check that the sizes fit
        self.mean = torch.nn.Linear(h_dim, z_dim)

    def forward(self, h: torch.Tensor) -> pyro.distributions.Distribution:
        """Map h of shape (*batch, H) to a distribution with event shape (Z,)."""
        return pyro.distributions.Normal(self.mean(h), 1.0).to_event(1)


# Every variant is the VRNN of the first script with one part changed.
sizes = {"x_dim": 12, "z_dim": 8, "h_dim": 64}
variants = {
    "as before": lambda: recipes.vrnn(**sizes),
    "prior: flow": lambda: recipes.vrnn(**sizes, prior="flow"),
    "prior: your own": lambda: recipes.vrnn(**sizes, prior=UnitPrior),
    "guide: smoothing": lambda: recipes.vrnn(**sizes, guide="smoothing"),
    "cell: LSTM": lambda: recipes.vrnn(**sizes, cell="lstm"),
    "emission: mixture": lambda: recipes.vrnn(**sizes, emission="mixture"),
    "model: SRNN": lambda: recipes.srnn(**sizes),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--smoke", action="store_true", help="3 steps, to see that it runs")
args = parser.parse_args()
torch.set_num_threads(1)
data = vowels()
steps, test = (3, data.test.select(range(20))) if args.smoke else (args.steps, data.test)
training = {"validation": (data.valid.x, data.valid.mask), "clip_norm": AdaptiveClip(), "seed": 0}

for name, make in variants.items():
    with pyro.get_param_store().scope(), seeded(0):
        r = make()
        loss, adam = ELBO(kl_weight=Ramp(0, 1, over=0.5)), pyro.optim.Adam({"lr": 2e-3})
        batches = Batches(data.train, 64, seed=0)
        fit(SVI(r.model, r.guide, adam, loss), batches, steps=steps, progress=name, **training)
        found = evaluate(r.model, r.guide, test.x, test.mask)
    print(f"{name:18} IWAE {found.iwae_per_frame:5.2f} ± {found.iwae_per_frame_se:.2f}", end="")
    print(f"  ELBO {found.elbo_per_frame:5.2f}  KL {found.kl_per_frame:4.2f}", flush=True)

# Some parts do not go together. The recipe then says so, before any training.
try:
    recipes.vrnn(**sizes, prior="flow", guide="residual")
except NotImplementedError as error:
    print(f"\nflow prior, residual guide: {error}")
