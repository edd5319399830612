"""What ``compare_commits.py`` computes of a case: functions that name and compute tensors of it.

Weights, data and draws follow from fixed seeds. A name begins with its kind, which is a column of
the table.
"""

import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pyro
import torch
from commit_cases import Case, K, adversarial, penalised, recomputed, trained
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import inference
from inference import ELBO, FIVO, IWAE, Ramp, evaluate, particle_filter, step_densities
from pyro_avrnn import generation

#: names, each with a tensor, a number or None
Found = Iterator[tuple[str, Any]]


def bounds(case: Case, weight: float) -> dict[str, Any]:
    """Every objective that suits a case, fresh."""
    given = {"num_particles": K, "kl_weight": weight}
    chosen: dict[str, Any] = {
        "elbo": ELBO(**given),
        "free-bits": ELBO(**given, free_bits=0.5),
        "iwae": IWAE(**given),
        "iwae-dreg": IWAE(**given, doubly_reparameterised=True),
        "fivo": FIVO(**given),
        "fivo-score": FIVO(
            **given, resampler="multinomial", criterion="always", score_function=True
        ),
    }
    if case.normal:
        chosen["elbo-analytic"] = ELBO(**given, analytic_kl=True)
    if weight == 1.0:
        chosen |= {"elbo-recomputed": recomputed(2), "trace-elbo": Trace_ELBO()}
    return chosen


def loss_and_gradients(recipe: Any, loss: Any, *args: Any) -> Found:
    """What SVI sees of a loss."""
    for p in [*recipe.model.parameters(), *recipe.guide.parameters()]:
        p.grad = None
    torch.manual_seed(7)
    with pyro.get_param_store().scope():
        svi = SVI(recipe.model, recipe.guide, pyro.optim.SGD({"lr": 0.1}), loss=loss)
        yield "loss/value", svi.loss_and_grads(recipe.model, recipe.guide, *args)
    for name, term in getattr(loss, "terms", {}).items():
        yield f"loss/{name}", term
    yield from gradients(recipe, "gradient")


def gradients(recipe: Any, kind: str) -> Found:
    """Every parameter's gradient, None where there is none."""
    for name, p in parameters(recipe).items():
        yield f"{kind}/{name}", p.grad


def parameters(recipe: Any) -> dict[str, Tensor]:
    """Parameters of model and guide by name."""
    return {
        f"{part}.{name}": p
        for part in ("model", "guide")
        for name, p in getattr(recipe, part).named_parameters()
    }


def state(module: Any, kind: str) -> Found:
    """Parameters and buffers of a module."""
    for name, value in module.state_dict().items():
        yield f"{kind}/{name}", value


def densities(case: Case) -> Found:
    """Initial parameters, draws and log-densities: by rollout, of given latents, by tracing."""
    recipe, (x, mask) = case.build(), case.data()
    for part in ("model", "guide", "critic"):
        if getattr(recipe, part) is not None:
            yield from state(getattr(recipe, part), f"initial/{part}")

    def plain_model(x: Tensor, mask: Tensor) -> Any:
        return recipe.model(x, mask)

    torch.manual_seed(7)
    drawn = recipe.model.rollout(recipe.guide, x, mask, num_particles=K)
    given = {"z": drawn.z[:, :2]} | ({} if drawn.f is None else {"f": drawn.f[:2]})
    with pyro.get_param_store().scope():
        torch.manual_seed(7)
        traced = step_densities(plain_model, recipe.guide, x, mask, num_particles=K)
    for way, found in (
        ("rollout", drawn),
        ("given", recipe.model.rollout(recipe.guide, x, mask, **given)),
        ("traced", traced),
    ):
        yield f"draws/{way}/z", found.z
        yield f"draws/{way}/f", getattr(found, "f", None)
        for name in ("log_prior", "log_emission", "log_proposal", "log_weight"):
            yield f"densities/{way}/{name}", getattr(found, name)
    yield "densities/rollout/h", drawn.h


def losses(case: Case) -> Found:
    """Value, terms and gradients of every objective, with KL weight 1 and 0.5."""
    x, mask = case.data()
    recipe = case.build()
    for weight in (1.0, 0.5):
        for name, bound in bounds(case, weight).items():
            for found, value in loss_and_gradients(recipe, bound, x, mask):
                kind, rest = found.split("/", 1)
                yield f"{kind}/{name}/kl_weight={weight}/{rest}", value
    for found, value in loss_and_gradients(recipe, ELBO(num_particles=K), x[:1], mask[:1]):
        kind, rest = found.split("/", 1)
        yield f"{kind}/elbo/no padding/{rest}", value


def filters(case: Case) -> Found:
    """Particle filters with two resamplers, and with the model's transition as proposal."""
    recipe, (x, mask) = case.build(), case.data()
    for name, guide, options in (
        ("ess", recipe.guide, {}),
        ("always", recipe.guide, {"resampler": "multinomial", "criterion": "always"}),
        ("bootstrap", None, {"resampler": "stratified"}),
    ):
        torch.manual_seed(7)
        with torch.no_grad():
            found = particle_filter(recipe.model, guide, x, mask, num_particles=16, **options)
        for value in ("log_evidence", "log_evidence_path", "log_weight", "ess", "resampled"):
            yield f"filter/{name}/{value}", getattr(found, value)
        for value in ("ancestors", "mean", "z"):
            yield f"filter/{name}/{value}", getattr(found, value)
        yield f"filter/{name}/lineage", found.lineage()
        yield f"filter/{name}/trajectories", found.trajectories()


def evaluations(case: Case) -> Found:
    """Held-out numbers; the rate split where all parts are the recipe's own."""
    recipe, (x, mask) = case.build(), case.data()
    options: dict[str, Any] = {} if case.parts else {"train": case.data(seed=4)}
    if recipe.critic is not None:
        options["adversarial"] = critic_of(case, recipe)
    given = {"num_particles": 25, "fivo_particles": 4, "batch_size": 2, "particles_at_once": 10}
    found = evaluate(recipe.model, recipe.guide, x, mask, **given, **options)
    for name, value in found.as_dict().items():
        yield f"evaluate/{name}", value


def generated(case: Case) -> Found:
    """Free runs, continuations, swapped f, and the model as a Pyro program without data."""
    recipe, (x, mask) = case.build(), case.data()
    torch.manual_seed(7)
    yield "generate/free", generation.generate(recipe.model, 2, 3)
    if case.emission == "normal":
        yield "generate/mean", generation.generate(recipe.model, 2, 3, mean=True)
    options = {"steps": 2, "num_continuations": 3, "num_particles": 4}
    continued = generation.continue_from(recipe.model, recipe.guide, x, mask, **options)
    yield "generate/continued", continued
    if case.has_f:
        order = [1, 0, 2, 4, 3]
        place: Any = generation  # of older commits
        if not hasattr(place, "swap_f"):
            place = import_module("pyro_avrnn.exchange")
        yield "generate/swapped", place.swap_f(recipe.model, recipe.guide, x, order, mask)
    with pyro.get_param_store().scope():
        trace = poutine.trace(recipe.model).get_trace(None, mask)
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["name"].startswith(("sequences", "particles")):
            yield f"generate/program/{name}", site["value"]


def runs(case: Case) -> Found:
    """Three steps of ``fit``, with the critic's update if there is one, then with truncation."""
    batches = [case.data(), case.data(seed=4)]
    for name, steps, options in (("fit", 3, {}), ("truncated", 4, {"truncate": 2})):
        recipe = case.build()
        bound = IWAE(num_particles=K, kl_weight=Ramp(0.0, 1.0, over=0.5))
        if recipe.critic is not None:
            critic = critic_of(case, recipe)
            bound = penalised(ELBO, [critic], kl_weight=0.5)
            options |= {"hooks": [critic.update], "keep": [recipe.critic]}
        optim = pyro.optim.Adam({"lr": 1e-2})
        with pyro.get_param_store().scope():
            svi = SVI(recipe.model, recipe.guide, optim, loss=bound)
            history = trained(svi, batches, steps, lr_schedule=Ramp(1.0, 0.5), **options)
        for i, row in enumerate(history.rows):
            for column, value in row.items():
                yield f"fit/{name}/row {i}/{column}", value
        yield f"fit/{name}/best", torch.tensor([history.best_step, history.best_bound])
        for part in ("model", "guide", "critic"):
            if getattr(recipe, part) is not None:
                yield from state(getattr(recipe, part), f"fit/{name}/{part}")


def critic_of(case: Case, recipe: Any) -> Any:
    """The case's critic as a penalty."""
    options = {"constraint": "penalty"} | case.critic
    constraint = {
        "penalty": inference.gradient_penalty,
        "spectral": inference.spectral,
        "clip": inference.clip,
    }[options.pop("constraint")]
    view = case.parts.get("view", "conditional")
    divergence = inference.wasserstein(constraint())
    return adversarial(recipe, view, divergence=divergence, weight=0.7, **options)


def critics(case: Case) -> Found:
    """A critic's penalty, its update, the objectives it enters, the alternating schedule."""
    recipe, (x, mask) = case.build(), case.data()
    if recipe.critic is None:
        return
    critic = critic_of(case, recipe)
    torch.manual_seed(7)
    drawn = recipe.model.rollout(recipe.guide, x, mask, num_particles=K)
    penalty = critic.penalty(drawn)
    penalty.backward()
    yield "critic/penalty", penalty
    yield from gradients(recipe, "critic/gradient")
    for name, value in critic.update(recipe.model, recipe.guide, x, mask).items():
        yield f"critic/update/{name}", value
    yield from state(recipe.critic, "critic/parameters")
    objectives = [("elbo", penalised(ELBO, [critic], kl_weight=0.5))]
    objectives += [("iwae", penalised(IWAE, [critic], num_particles=K))]
    objectives += [] if case.has_f else [("no-kl", penalised(ELBO, [critic], kl_weight=0.0))]
    for name, bound in objectives:
        for found, value in loss_and_gradients(recipe, bound, x, mask):
            yield f"critic/{name}/{found}", value
    if case.has_f:
        return
    for detached in (True, False):
        recipe = case.build()
        transition, proposal = recipe.model.prior.parameters(), recipe.guide.parameters()
        step = inference.Alternating(
            critic_of(case, recipe), transition, proposal, detach_state=detached
        )
        torch.manual_seed(7)
        for name, value in step.update(recipe.model, recipe.guide, x, mask).items():
            yield f"alternating/detached={detached}/{name}", value
        for part in ("model", "guide", "critic"):
            yield from state(getattr(recipe, part), f"alternating/detached={detached}/{part}")


MEASUREMENTS: tuple[Callable[[Case], Found], ...] = (
    densities,
    losses,
    critics,
    filters,
    evaluations,
    generated,
    runs,
)


def measure(case: Case) -> dict[str, Tensor | str | None]:
    """All tensors of a case by name; the traceback of a measurement that failed."""
    found: dict[str, Tensor | str | None] = {}
    for measurement in MEASUREMENTS:
        torch.manual_seed(6)
        try:
            for name, value in measurement(case):
                tensor = None if value is None else torch.as_tensor(value).detach().clone()
                found[name] = tensor
        except Exception:
            found[f"failed/{measurement.__name__}"] = traceback.format_exc()
    return found
