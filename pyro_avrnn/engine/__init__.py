"""The fast path: one step of guide and model, captured as a graph and run for all steps.

See :mod:`~pyro_avrnn.engine.capture` for how a step is taken apart,
:mod:`~pyro_avrnn.engine.loops` for how its recurrence is run and differentiated, and
:mod:`~pyro_avrnn.engine.recurrence` for when.
"""

from pyro_avrnn.engine.recurrence import of_proposal, run, switched_off, terms

__all__ = ["of_proposal", "run", "switched_off", "terms"]
