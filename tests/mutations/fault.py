"""What is planted, and the tests that must notice it."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A change of the code that some test must notice."""

    path: str  # of the file, from the root
    name: str  # in words
    old: str  # stands in the file once
    new: str
    tests: tuple[str, ...]  # files or node ids that are run, from the root
    equivalent: str = ""  # why no test can notice it, if so
