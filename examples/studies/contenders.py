"""The contenders of the speed benchmark: one training step of one VRNN, written in several ways.

Given the same weights and noise, all must find the same loss and the same gradient norm, which
this file prints when it is run by itself (half a minute). What disagrees is not timed.

* pyro: model and guide as Pyro programs under SVI and Trace_ELBO, step by step in a markov loop
* rollout, and compiled: our ELBO with time as a batch dimension, under a torch optimiser
* svi: the same ELBO under Pyro's SVI, whose parameter store costs a little
* torch: no Pyro; a loop over the recurrence, all that can wait computed for all steps at once
* jax: one jitted step, lax.scan over the recurrence; the parts of products that need no loop are
  taken out of it, and two products with one state are one, which XLA does not do by itself
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from inference import ELBO
from pyro_avrnn import recipes

SEED, RATE, FLOOR, HALF_LOG_TAU = 1, 1e-3, 1e-3, 0.9189385332046727
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the yardstick
Arrays = dict[str, Any]  # of numpy, by name


class Size(NamedTuple):
    """Sequences, steps, features of x, of z, and width of every layer."""

    B: int
    T: int
    X: int
    Z: int
    H: int
    emission: str = "normal"


SIZES = {
    "tiny": Size(2, 4, 8, 4, 4),  # to see that all runs
    "small": Size(4, 20, 200, 64, 64),
    "medium": Size(16, 100, 200, 64, 256),
    "large": Size(32, 200, 200, 128, 512),
    "music": Size(16, 160, 88, 32, 32, "bernoulli"),
}


class Contender(NamedTuple):
    """Loss and gradient norm at the start, noise given, and what runs one training step."""

    loss: float
    norm: float
    step: Callable[[], Any]


def recipe(size: Size, make: Callable[..., Any] = recipes.vrnn, **parts: Any) -> Any:
    torch.manual_seed(0)
    return make(size.X, size.Z, size.H, size.emission, **parts)


def data(size: Size) -> tuple[Tensor, Tensor]:
    """White noise, or piano rolls with four notes a step, ``(B, T, X)``; a mask of True."""
    shape, generator = (size.B, size.T, size.X), torch.Generator().manual_seed(0)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    if size.emission == "normal":
        return torch.randn(shape, generator=generator), mask
    return (torch.rand(shape, generator=generator) < 4 / size.X).float(), mask


def noise(size: Size) -> Tensor:
    """``(T, B, Z)``, as torch's generator seeded with SEED gives it to a loop over the steps."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([torch.randn(size.B, size.Z, generator=generator) for _ in range(size.T)])


def start(size: Size) -> Arrays:
    """The weights of model and guide, under the names that all contenders know them by."""
    r = recipe(size)
    named = {**dict(r.model.named_parameters()), **dict(r.guide.named_parameters(prefix="guide"))}
    weights = {}
    for name, value in named.items():
        for long, short in ((".network", ""), (".net.", "."), ("cell.cell", "cell")):
            name = name.replace(long, short)
        weights[name] = value.detach().numpy().copy()
    return weights


def ours(kind: str, size: Size, weights: Arrays, device: str) -> Contender:
    """This library: the markov loop, the rollout, and the rollout under SVI."""
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
    """Forward, backward and Adam, as every torch contender without Pyro's SVI takes its step."""
    optim = torch.optim.Adam(parameters, lr=RATE, fused=True)

    def step() -> None:
        optim.zero_grad()
        loss().backward()
        optim.step()

    return step


class PlainVRNN(nn.Module):
    """A VRNN as one writes it in torch alone."""

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
    loc, raw = outputs.chunk(2, dim=-1)
    return loc, FLOOR + F.softplus(raw + 0.5)


def plain(size: Size, weights: Arrays, device: str) -> Contender:
    """Torch without Pyro."""
    net, x = PlainVRNN(size), data(size)[0].transpose(0, 1).contiguous()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    first = net(x, noise(size))
    first.backward()
    found = first.item(), get_total_norm([p.grad for p in net.parameters()]).item()
    net, x = net.to(device), x.to(device)
    shape, own = (size.T, size.B, size.Z), [*net.parameters()]
    return Contender(*found, descent(own, lambda: net(x, torch.randn(shape, device=device))))


def jitted(size: Size, weights: Arrays) -> Contender:
    """JAX."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    relu, sigmoid, normal, width = jax.nn.relu, jax.nn.sigmoid, size.emission == "normal", size.H

    def dense(p: Any, layer: str, inputs: Any) -> Any:
        return inputs @ p[f"{layer}.weight"] + p[f"{layer}.bias"]

    def halves(outputs: Any) -> Any:
        loc, raw = jnp.split(outputs, 2, axis=-1)
        return loc, FLOOR + jax.nn.softplus(raw + 0.5)

    def loss(p: Any, x: Any, eps: Any) -> Any:
        phi_x = relu(dense(p, "encode_x.0", x))
        # what products with [phi(x), .] owe to phi(x), for all steps at once
        of_x, of_h = jnp.split(p["guide.0.weight"], 2)
        to_guide = phi_x @ of_x + p["guide.0.bias"]
        cell_x, cell_z = jnp.split(p["cell.weight_ih"], 2)
        to_cell = phi_x @ cell_x + p["cell.bias_ih"]
        from_h = jnp.concatenate([of_h, p["cell.weight_hh"]], axis=1)

        def step(h: Any, inputs: Any) -> Any:
            guide_t, cell_t, eps_t = inputs
            read, gates = jnp.split(h @ from_h, [width], axis=-1)
            loc, scale = halves(dense(p, "guide.2", relu(guide_t + read)))
            z = loc + scale * eps_t
            phi_z = relu(dense(p, "encode_z.0", z))
            new_r, new_u, new_n = jnp.split(cell_t + phi_z @ cell_z, 3, axis=-1)
            old_r, old_u, old_n = jnp.split(gates + p["cell.bias_hh"], 3, axis=-1)
            n = jnp.tanh(new_n + sigmoid(new_r + old_r) * old_n)
            return n + sigmoid(new_u + old_u) * (h - n), (h, z, scale, phi_z)

        begin = jnp.zeros((size.B, width))
        _, (h, z, scale, phi_z) = lax.scan(step, begin, (to_guide, to_cell, eps))
        loc, prior_scale = halves(dense(p, "prior.2", relu(dense(p, "prior.0", h))))
        distance = ((z - loc) / prior_scale) ** 2 - eps**2
        kl = (0.5 * distance + jnp.log(prior_scale) - jnp.log(scale)).sum()
        both = jnp.concatenate([phi_z, h], axis=-1)
        outputs = dense(p, "decoder.2", relu(dense(p, "decoder.0", both)))
        if not normal:
            return kl + (jax.nn.softplus(outputs) - x * outputs).sum()
        loc, scale = halves(outputs)
        return kl + (0.5 * ((x - loc) / scale) ** 2 + jnp.log(scale) + HALF_LOG_TAU).sum()

    def train(p: Any, m: Any, v: Any, t: Any, key: Any, x: Any) -> Any:
        key, now = jax.random.split(key)
        eps = jax.random.normal(now, (size.T, size.B, size.Z))
        value, g = jax.value_and_grad(loss)(p, x, eps)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        up, down = 1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)
        p = jax.tree.map(lambda p, m, v: p - RATE * m / up / (jnp.sqrt(v / down) + 1e-8), p, m, v)
        return (p, m, v, t + 1, key), value

    p = {name: jnp.asarray(value.T) for name, value in weights.items()}
    x = jnp.asarray(data(size)[0].transpose(0, 1).numpy())
    first, gradients = jax.jit(jax.value_and_grad(loss))(p, x, jnp.asarray(noise(size).numpy()))
    found = float(first), float(sum((g**2).sum() for g in gradients.values()) ** 0.5)
    m, v = (jax.tree.map(jnp.zeros_like, p) for _ in range(2))
    state = (p, m, v, jnp.zeros(()), jax.random.key(SEED))
    compiled = jax.jit(train, donate_argnums=(0, 1, 2, 3, 4))

    def step() -> None:
        nonlocal state
        state, value = compiled(*state, x)
        jax.block_until_ready((state, value))

    return Contender(*found, step)


def make(name: str, size: Size, weights: Arrays, device: str) -> Contender:
    """A contender, or a yardstick, ``... product``: that of two square matrices."""
    if "product" in name:
        a, b = (torch.randn(SIDE[device], SIDE[device], device=device) for _ in range(2))
        if "jax" in name:
            from jax import numpy as jnp

            x, y = jnp.asarray(a.numpy()), jnp.asarray(b.numpy())
            return Contender(0.0, 0.0, lambda: (x @ y).block_until_ready())
        return Contender(0.0, 0.0, lambda: a @ b)
    if name == "jax":
        return jitted(size, weights)
    return plain(size, weights, device) if name == "torch" else ours(name, size, weights, device)


def contenders(device: str = "cpu", label: str = "medium") -> list[str]:
    """Those that can be had here: svi at one size, and few at all where speed is no question."""
    more = ["pyro", "rollout compiled", *(["svi"] if label == "medium" else [])]
    jax = ["jax"] if device == "cpu" and find_spec("jax") else []
    return ["torch", "rollout", *([] if label == "tiny" else more), *jax]


def missing() -> Iterator[str]:
    """What cannot be timed here, a sentence each."""
    if not find_spec("jax"):
        yield 'Without JAX, which is not installed: pip install "pyro-avrnn[bench]"'
    if not torch.cuda.is_available():
        yield "No GPU was at hand: the CPU alone is timed."


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
