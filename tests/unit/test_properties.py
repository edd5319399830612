"""Any x, mask, length and dtype: the right number, or one sentence.

The model is linear and Gaussian, and its guide the exact smoother, so that every weighted path
has the weight p(x): a verb's number for a batch is the sum of the evidence of its sequences, each
without its padding, by a Kalman filter that knows nothing of the library.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference import ELBO, FIVO, IWAE, evaluate, particle_filter, seeded, sequence_codes
from inference.traces import step_densities
from pyro_avrnn.generation import continue_from
from pyro_avrnn.models import LGSSM, ExactSmoother
from tests.reference import kalman

A, Q, R, S0 = 0.9, 0.7, 0.5, 1.3
#: what a public verb says of a batch, a number for each sequence or their sum
Verb = Callable[[Any, Any, Any, Any], float]
VERBS: dict[str, Verb] = {
    "rollout": lambda m, g, x, mask: float(m.rollout(g, x, mask, 2).log_weight.sum() / 2),
    "step densities": lambda m, g, x, mask: float(step_densities(m, g, x, mask).log_weight.sum()),
    "elbo": lambda m, g, x, mask: -float(ELBO()(m, g, x, mask)),
    "iwae": lambda m, g, x, mask: -float(IWAE(num_particles=2)(m, g, x, mask)),
    "fivo": lambda m, g, x, mask: -float(FIVO(num_particles=2, criterion="never")(m, g, x, mask)),
    "filter": lambda m, g, x, mask: float(
        particle_filter(m, g, x, mask, num_particles=2, criterion="never").log_evidence.sum()
    ),
    "evaluate": lambda m, g, x, mask: (
        (found := evaluate(m, g, x, mask, num_particles=3, batch_size=2)).iwae_per_frame
        * found.frames
    ),
}


def evidence(x: np.ndarray) -> float:
    one = np.eye(1)
    return kalman.log_evidence(x, A * one, Q**2 * one, one, R**2 * one, np.zeros(1), S0**2 * one)


@st.composite
def batches(draw: Callable[..., Any]) -> tuple[Any, Any]:
    """Data and mask, most of them as they should be, some not."""
    size, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    x: Any = torch.tensor(random.normal(size=(size, length, 1)) * draw(st.sampled_from([1, 30])))
    lengths = torch.tensor(draw(st.lists(st.integers(0, length), min_size=size, max_size=size)))
    mask: Any = torch.arange(length) < lengths[:, None]
    padding = draw(st.sampled_from([0.0, float("nan"), float("inf"), 1e300]))
    x = torch.where(mask[..., None], x, padding)
    change = draw(st.sampled_from(["none"] * 4 + [*CHANGES]))
    return CHANGES[change](x, mask) if change != "none" else (x, mask)


CHANGES: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "no mask": lambda x, mask: (x.nan_to_num(0.3, 0.3, 0.3).clamp(-9, 9), None),
    "shuffled mask": lambda x, mask: (x, mask.flip(1)),
    "wider mask": lambda x, mask: (x, torch.cat([mask, mask[:, :1] & False], dim=1)),
    "numbers as mask": lambda x, mask: (x, mask.double()),
    "list as mask": lambda x, mask: (x, mask.tolist()),
    "float32": lambda x, mask: (x.float(), mask),
    "integers": lambda x, mask: (torch.zeros_like(x, dtype=torch.int64), mask),
    "numpy": lambda x, mask: (x.numpy(), mask),
    "two dimensions": lambda x, mask: (x[..., 0], mask),
    "two features": lambda x, mask: (x.expand(-1, -1, 2), mask),
    "no sequence": lambda x, mask: (x[:0], mask[:0]),
    "no step": lambda x, mask: (x[:, :0], mask[:, :0]),
    "nan among the data": lambda x, mask: (
        x.clone().index_fill_(1, torch.tensor([0]), torch.nan),
        mask,
    ),
    "None": lambda x, mask: (None, mask),
}


def expected(x: Any, mask: Any) -> float | None:
    """The sum of the sequences' evidence; None where the batch ought to be refused."""
    if not (isinstance(x, Tensor) and x.dtype == torch.float64 and x.ndim == 3):
        return None
    if 0 in x.shape or x.shape[2] != 1:
        return None
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        return None
    lengths = mask.sum(dim=1)
    if not torch.equal(mask, torch.arange(x.shape[1]) < lengths[:, None]):
        return None
    series = [row[:n].numpy() for row, n in zip(x, lengths.tolist(), strict=True)]
    if not all(np.isfinite(one).all() for one in series):
        return None
    return sum(evidence(one) for one in series)


@pytest.mark.parametrize("verb", VERBS)
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=batches())
def test_the_evidence_of_the_sequences_or_one_sentence(verb: str, batch: tuple[Any, Any]) -> None:
    model = LGSSM.scalar(A, Q, R, S0)
    guide = ExactSmoother(model)
    x, mask = batch
    truth = expected(x, mask)
    try:
        with seeded(0), torch.no_grad():
            found = VERBS[verb](model, guide, x, mask)
    except (TypeError, ValueError) as error:
        said = str(error)
        assert "\n" not in said and said[0].islower() and ("must" in said or "needed" in said)
        # evaluate needs a frame at least
        assert truth is None or (verb == "evaluate" and not bool(mask.any()))
    else:
        assert truth is not None, f"{verb} gives {found} for a batch that is none"
        assert found == pytest.approx(truth, rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(batch=batches())
def test_codes_and_continuations_too(batch: tuple[Any, Any]) -> None:
    model = LGSSM.scalar(A, Q, R, S0)
    guide, (x, mask) = ExactSmoother(model), batch
    good = expected(x, mask) is not None and (mask is None or bool(mask.any(dim=1).all()))
    for verb in (
        lambda: sequence_codes(model, guide, x, mask).z,
        lambda: continue_from(model, guide, x, mask, steps=2, num_continuations=3),
    ):
        try:
            found = verb()
        except (TypeError, ValueError) as error:
            assert not good and "\n" not in str(error)
        else:
            assert good and bool(found.isfinite().all())


def test_the_comparison_sees_padding_that_is_counted() -> None:
    model = LGSSM.scalar(A, Q, R, S0)
    x = torch.randn(2, 4, 1)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with seeded(0), torch.no_grad():
        counted = VERBS["elbo"](model, ExactSmoother(model), x, None)
    assert abs(counted - expected(x, mask)) > 1e-3
