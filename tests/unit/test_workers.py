"""What a worker process does before it works."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FREED = """
import os, sys, torch
from pyro_avrnn.cli.workers import keep_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "keep":
    keep_memory()
torch.ones(10)
before, some = resident(), torch.ones(50_000_000)
del some
print(resident() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="needs the C library of GNU",
)
@pytest.mark.parametrize(("way", "kept"), [("keep", True), ("give", False)])
def test_what_is_freed_stays_with_the_process(way: str, kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FREED, way],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) > 150_000_000) == kept  # of 200 MB
