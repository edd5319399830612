"""Random operations of a step, which become its inputs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.capture import aten, value
from pyro_avrnn.engine.front import Uncapturable

_LIKE = {aten.rand_like.default, aten.randn_like.default}
_EMPTY = {aten.new_empty.default, aten.empty_like.default}


@dataclass
class Noise:
    """A random operation of the step, drawn for every step in the order of the loop."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: Tensor

    def __call__(self) -> Tensor:
        """Draw the noise of one step."""
        made: Tensor = self.target(*self.args, **self.kwargs)
        return made

    def of(self, steps: int) -> Tensor:
        """Draw the noise of several steps by one call."""

        def longer(given: Any) -> Any:
            if isinstance(given, Tensor):
                return given.expand(steps, *given.shape).contiguous()
            return [steps, *given] if isinstance(given, list) else given

        made: Tensor = self.target(*map(longer, self.args), **self.kwargs)
        return made

    def flows(self) -> bool:
        """Whether one call for all steps draws the same numbers as one call a step."""
        if self.like.device.type != "cpu" or self.like.numel() % 16:  # torch draws in sixteens
            return False
        with torch.random.fork_rng([]):
            state = torch.get_rng_state()
            found = torch.stack([self() for _ in range(3)]), torch.rand(())
            torch.set_rng_state(state)
            again = self.of(3), torch.rand(())
        return all(map(torch.equal, found, again))


def take_noise(graph: fx.GraphModule) -> dict[fx.Node, Noise]:
    """Replace every random operation by an input, and return how it is drawn."""
    found: dict[fx.Node, Noise] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        given = [] if node.target in _LIKE else [n for n in node.args if isinstance(n, fx.Node)]
        given += [n for n in node.kwargs.values() if isinstance(n, fx.Node)]
        if not all(map(_is_blank, given)):  # such as probabilities of this step
            raise Uncapturable(f"{node.target} draws what depends on the step")
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"noise_{len(found)}")
        last.meta["value"] = value(node)
        node.replace_all_uses_with(last)
        args = tuple(value(n) if isinstance(n, fx.Node) else n for n in node.args)
        found[last] = Noise(node.target, args, dict(node.kwargs), value(node))
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    return found


def _is_blank(node: fx.Node) -> bool:
    """Whether nothing but the shape of a tensor matters."""
    return node.target in _EMPTY or node.op == "call_function" and not node.all_input_nodes
