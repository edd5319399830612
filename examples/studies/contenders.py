"""The contenders of the speed benchmark: one training step of one VRNN, written in several ways.

Given the same weights and noise, all must compute the same loss and the same gradient norm; this
file prints both when you run it (half a minute). What disagrees is not timed.

* pyro: model and guide as Pyro programs under SVI and Trace_ELBO, step by step in a markov loop
* rollout, and compiled: our ELBO with time as a batch dimension, under a torch optimiser
* svi: the same ELBO under Pyro's SVI, whose parameter store costs a little
* torch: no Pyro; a loop over the recurrence, and everything else for all steps at once
* jax: one jitted step, see ``vrnn_in_jax.py``
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import pyro
import torch
from problem import (
    FLOOR,
    HALF_LOG_TAU,
    RATE,
    SEED,
    SIZES,
    Arrays,
    Size,
    data,
    noise,
    recipe,
    start,
)
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from inference import ELBO

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the yardstick


class Contender(NamedTuple):
    """Loss and gradient norm at the start, and a function that runs one training step."""

    loss: float
    norm: float
    step: Callable[[], Any]


def ours(kind: str, size: Size, weights: Arrays, device: str) -> Contender:
    """Set up this library: the markov loop, the rollout, and the rollout under SVI."""
    r, (x, mask) = recipe(size), data(size)
    parameters = [*r.model.parameters(), *r.guide.parameters()]
    with torch.no_grad():
        for parameter, value in zip(parameters, weights.values(), strict=True):
            parameter.copy_(torch.from_numpy(value))
    bound = Trace_ELBO() if kind == "pyro" else ELBO(compile=kind == "rollout compiled")
    loss = bound.differentiable_loss if kind == "pyro" else bound
    torch.manual_seed(SEED)
    first = loss(r.model, r.guide, x, mask)
    first.backward()
    found = first.item(), get_total_norm([p.grad for p in parameters]).item()
    pyro.clear_param_store()
    model, guide, x, mask = r.model.to(device), r.guide.to(device), x.to(device), mask.to(device)
    if kind in ("pyro", "svi"):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE, "fused": True}), loss=bound)
        return Contender(*found, lambda: svi.step(x, mask))
    return Contender(*found, descent(parameters, lambda: loss(model, guide, x, mask)))


def descent(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Make the step of every torch contender without SVI: forward, backward and Adam."""
    optim = torch.optim.Adam(parameters, lr=RATE, fused=True)

    def step() -> None:
        optim.zero_grad()
        loss().backward()
        optim.step()

    return step


class PlainVRNN(nn.Module):
    """A VRNN in torch alone."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        _, _, x, z, h, emission = size

        def net(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, h), nn.ReLU(), nn.Linear(h, outputs))

        self.normal = emission == "normal"
        self.encode_x = nn.Sequential(nn.Linear(x, h), nn.ReLU())
        self.encode_z = nn.Sequential(nn.Linear(z, h), nn.ReLU())
        self.guide, self.prior = net(2 * h, 2 * z), net(h, 2 * z)
        self.decoder = net(2 * h, 2 * x if self.normal else x)
        self.cell = nn.GRUCell(2 * h, h)

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """Negative ELBO summed over the batch, of x ``(T, B, X)`` and noise ``(T, B, Z)``."""
        phi_x = self.encode_x(x)
        h = x.new_zeros(x.shape[1], self.cell.hidden_size)
        kept = []
        for phi_t, eps_t in zip(phi_x.unbind(), eps.unbind(), strict=True):
            loc, scale = parameters_of(self.guide(torch.cat([phi_t, h], dim=-1)))
            z = torch.addcmul(loc, scale, eps_t)
            phi_z = self.encode_z(z)
            kept.append((h, z, scale, phi_z))
            if len(kept) < len(x):
                h = self.cell(torch.cat([phi_t, phi_z], dim=-1), h)
        h, z, scale, phi_z = map(torch.stack, zip(*kept, strict=True))
        loc, prior_scale = parameters_of(self.prior(h))
        distance = ((z - loc) / prior_scale).square() - eps.square()
        kl = (0.5 * distance + prior_scale.log() - scale.log()).sum()
        outputs = self.decoder(torch.cat([phi_z, h], dim=-1))
        if not self.normal:
            return kl + F.binary_cross_entropy_with_logits(outputs, x, reduction="sum")
        loc, scale = parameters_of(outputs)
        cost = 0.5 * ((x - loc) / scale).square() + scale.log()
        return kl + cost.sum() + HALF_LOG_TAU * x.numel()


def parameters_of(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of a normal distribution."""
    loc, raw = outputs.chunk(2, dim=-1)
    return loc, FLOOR + F.softplus(raw + 0.5)


def plain(size: Size, weights: Arrays, device: str) -> Contender:
    """Set up torch without Pyro."""
    net, x = PlainVRNN(size), data(size)[0].transpose(0, 1).contiguous()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    first = net(x, noise(size))
    first.backward()
    found = first.item(), get_total_norm([p.grad for p in net.parameters()]).item()
    net, x = net.to(device), x.to(device)
    shape, own = (size.T, size.B, size.Z), [*net.parameters()]
    return Contender(*found, descent(own, lambda: net(x, torch.randn(shape, device=device))))


def make(name: str, size: Size, weights: Arrays, device: str) -> Contender:
    """Set up a contender, or a yardstick ``... product`` that multiplies two square matrices."""
    if "jax" in name:
        import vrnn_in_jax  # jax may be missing, and the others should not load it

        if name == "jax":
            return Contender(*vrnn_in_jax.jitted(size, weights))
    if "product" in name:
        a, b = (torch.randn(SIDE[device], SIDE[device], device=device) for _ in range(2))
        step = vrnn_in_jax.product(a.numpy(), b.numpy()) if "jax" in name else lambda: a @ b
        return Contender(0.0, 0.0, step)
    return plain(size, weights, device) if name == "torch" else ours(name, size, weights, device)


def contenders(device: str = "cpu", label: str = "medium") -> list[str]:
    """List those available here; svi runs at one size only, and the tiny size times few."""
    more = ["pyro", "rollout compiled", *(["svi"] if label == "medium" else [])]
    jax = ["jax"] if device == "cpu" and find_spec("jax") else []
    return ["torch", "rollout", *([] if label == "tiny" else more), *jax]


def missing() -> Iterator[str]:
    """Name what cannot be timed here, a sentence each."""
    if not find_spec("jax"):
        yield 'Without JAX, which is not installed: pip install "pyro-avrnn[bench]"'
    if not torch.cuda.is_available():
        yield "No GPU was at hand: only the CPU is timed."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny size, to see that it runs")
    size = SIZES["tiny" if parser.parse_args().smoke else "small"]
    for name in contenders():
        made = make(name, size, start(size), "cpu")
        print(f"{name:18} loss {made.loss:.4f}  gradient norm {made.norm:.4f}")
    print(*missing(), sep="\n")


if __name__ == "__main__":
    main()
