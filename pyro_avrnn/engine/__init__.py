"""The fast path: a step, captured as a graph and run for all steps; see :mod:`.scanning`."""

from pyro_avrnn.engine.scanning import Path, captures, scan, switched_off

__all__ = ["Path", "captures", "scan", "switched_off"]
