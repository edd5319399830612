"""The schedule of the paper on AVRNN: reconstruction and regularisation in separate steps.

Source: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, algorithms 1 and 2.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from inference.adversarial import Adversarial
from inference.densities import check_batch
from inference.protocols import Program, Stepwise, StepwiseGuide, at_least, of_kind
from inference.roles import draw
from inference.traces import step_densities


class Alternating:
    """Run algorithm 2 of AVRNN as a hook: critic steps, then one step on TR and PS.

    With ``ELBO(kl_weight=0)`` as SVI's loss (Algorithm 1, the reconstruction phase)
    this is the paper's schedule to the letter: reconstruction moves emission, proposal,
    recurrence and encoders; the critic moves alone; the adversarial step moves the transition
    (TR) and the proposal (PS) with an RMSProp of its own. It drifts on real data.

    Args:
        adversarial: the critic; the paper's is clipped, RMSProp(5e-5), 5 steps.
        transition: the parameters of TR, ``model.prior.parameters()``.
        proposal: the parameters of PS, ``guide.parameters()``.
        lr: of the adversarial step's RMSProp, which would divide a weight out.
        detach_state: keep h_t constant in the adversarial step, as the text updates TR and PS
            only; False lets the gradient reach TR and PS through all earlier steps.
    """

    def __init__(
        self,
        adversarial: Adversarial,
        transition: Iterable[nn.Parameter],
        proposal: Iterable[nn.Parameter],
        *,
        lr: float = 5e-5,
        detach_state: bool = True,
    ) -> None:
        of_kind(Adversarial, "an Adversarial", adversarial=adversarial)
        of_kind(Iterable, "parameters", transition=transition, proposal=proposal)
        at_least(0.0, lr=lr)
        self.adversarial, self.detach_state = adversarial, detach_state
        parameters = [*transition, *proposal]
        if not parameters:
            raise ValueError(
                "transition and proposal hold no parameters: nothing would be regularised"
            )
        self.parameters = parameters
        self.optim = torch.optim.RMSprop(parameters, lr=lr)

    def update(self, model: Program, guide: Program, *args: Any) -> dict[str, float]:
        """Run algorithm 2 for one batch; leave no gradient on model or guide."""
        options = self.adversarial.draws(model, guide)
        with torch.no_grad():
            densities = step_densities(model, guide, *args, **options)
        if densities.f is not None:
            raise NotImplementedError(
                "the alternating schedule compares z_t alone, so nothing would price the latent f "
                "that all steps share; use a joint objective with a kl_weight above 0"
            )
        metrics = self.adversarial.improve(densities)
        if self.detach_state:
            states = densities.states
            if (
                not (isinstance(model, Stepwise) and isinstance(guide, StepwiseGuide))
                or not states
            ):
                raise NotImplementedError(
                    "detach_state=True needs a model and guide with the stepwise functions "
                    "(transition, proposal); use detach_state=False"
                )
            c = guide.encode(*check_batch(model, *args)).transpose(0, 1).unsqueeze(1)
            densities = densities._replace(prior=model.transition(states))
            loss = self.adversarial.penalty(densities, draw(guide.proposal(states, c)))
        else:
            loss = self.adversarial.penalty(step_densities(model, guide, *args))
        self.optim.zero_grad(set_to_none=True)
        loss.backward()
        self.optim.step()
        for parameter in [*_parameters(model), *_parameters(guide), *self.parameters]:
            parameter.grad = None
        return metrics | {f"{self.adversarial.name}_penalty": loss.item()}

    def state_dict(self) -> dict[str, Any]:
        """The critic's side, and the optimiser of the adversarial step."""
        return {"adversarial": self.adversarial.state_dict(), "optim": self.optim.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.adversarial.load_state_dict(state["adversarial"])
        self.optim.load_state_dict(state["optim"])


def _parameters(program: Any) -> Iterator[nn.Parameter]:
    return program.parameters() if isinstance(program, nn.Module) else iter(())
