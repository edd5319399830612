"""The VRNN of the speed benchmark in JAX: one jitted training step, lax.scan over the recurrence.

The parts of products that need no loop are taken out of it, and two products with one state are
merged into one; XLA does neither by itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from problem import FLOOR, HALF_LOG_TAU, RATE, SEED, Arrays, Size, data, noise

relu, sigmoid, softplus = jax.nn.relu, jax.nn.sigmoid, jax.nn.softplus


def dense(p: Any, layer: str, inputs: Any) -> Any:
    """Apply a linear layer."""
    return inputs @ p[f"{layer}.weight"] + p[f"{layer}.bias"]


def normal(outputs: Any) -> Any:
    """Location and scale of a normal distribution."""
    loc, raw = jnp.split(outputs, 2, axis=-1)
    return loc, FLOOR + softplus(raw + 0.5)


def recurrence(p: Any, phi_x: Any, eps: Any) -> Any:
    """Run the loop: h, z, scale of the proposal and phi(z) of every step."""
    # what the products with [phi(x), .] owe to phi(x), for all steps at once
    of_x, of_h = jnp.split(p["guide.0.weight"], 2)
    to_guide = phi_x @ of_x + p["guide.0.bias"]
    cell_x, cell_z = jnp.split(p["cell.weight_ih"], 2)
    to_cell = phi_x @ cell_x + p["cell.bias_ih"]
    from_h = jnp.concatenate([of_h, p["cell.weight_hh"]], axis=1)
    width = of_h.shape[0]

    def step(h: Any, inputs: Any) -> Any:
        guide_t, cell_t, eps_t = inputs
        read, gates = jnp.split(h @ from_h, [width], axis=-1)
        loc, scale = normal(dense(p, "guide.2", relu(guide_t + read)))
        z = loc + scale * eps_t
        phi_z = relu(dense(p, "encode_z.0", z))
        new_r, new_u, new_n = jnp.split(cell_t + phi_z @ cell_z, 3, axis=-1)
        old_r, old_u, old_n = jnp.split(gates + p["cell.bias_hh"], 3, axis=-1)
        n = jnp.tanh(new_n + sigmoid(new_r + old_r) * old_n)
        return n + sigmoid(new_u + old_u) * (h - n), (h, z, scale, phi_z)

    begin = jnp.zeros((phi_x.shape[1], width))
    return lax.scan(step, begin, (to_guide, to_cell, eps))[1]


def loss(p: Any, x: Any, eps: Any, emission: str) -> Any:
    """Negative ELBO summed over the batch, of x ``(T, B, X)`` and noise ``(T, B, Z)``."""
    h, z, scale, phi_z = recurrence(p, relu(dense(p, "encode_x.0", x)), eps)
    loc, prior_scale = normal(dense(p, "prior.2", relu(dense(p, "prior.0", h))))
    distance = ((z - loc) / prior_scale) ** 2 - eps**2
    kl = (0.5 * distance + jnp.log(prior_scale) - jnp.log(scale)).sum()
    both = jnp.concatenate([phi_z, h], axis=-1)
    outputs = dense(p, "decoder.2", relu(dense(p, "decoder.0", both)))
    if emission != "normal":
        return kl + (softplus(outputs) - x * outputs).sum()
    loc, scale = normal(outputs)
    return kl + (0.5 * ((x - loc) / scale) ** 2 + jnp.log(scale) + HALF_LOG_TAU).sum()


def train(size: Size, p: Any, m: Any, v: Any, t: Any, key: Any, x: Any) -> Any:
    """Draw noise, and take one step of Adam."""
    key, now = jax.random.split(key)
    eps = jax.random.normal(now, (size.T, size.B, size.Z))
    value, g = jax.value_and_grad(loss)(p, x, eps, size.emission)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
    up, down = 1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)
    p = jax.tree.map(lambda p, m, v: p - RATE * m / up / (jnp.sqrt(v / down) + 1e-8), p, m, v)
    return (p, m, v, t + 1, key), value


def jitted(size: Size, weights: Arrays) -> tuple[float, float, Callable[[], None]]:
    """Loss and gradient norm at the first weights, and a function that runs a training step."""
    p = {name: jnp.asarray(value.T) for name, value in weights.items()}
    x = jnp.asarray(data(size)[0].transpose(0, 1).numpy())
    value_and_grad = jax.value_and_grad(partial(loss, emission=size.emission))
    first, gradients = jax.jit(value_and_grad)(p, x, jnp.asarray(noise(size).numpy()))
    norm = float(sum((g**2).sum() for g in gradients.values()) ** 0.5)
    m, v = (jax.tree.map(jnp.zeros_like, p) for _ in range(2))
    state = (p, m, v, jnp.zeros(()), jax.random.key(SEED))
    compiled = jax.jit(partial(train, size), donate_argnums=(0, 1, 2, 3, 4))

    def step() -> None:
        nonlocal state
        state, value = compiled(*state, x)
        jax.block_until_ready((state, value))

    return float(first), norm, step


def product(a: Any, b: Any) -> Callable[[], Any]:
    """Multiply two square matrices: the yardstick."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    return lambda: (a @ b).block_until_ready()
