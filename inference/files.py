"""Files written atomically, and read without unpickling anything."""

import csv
import json
import math
import os
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.protocols import of_kind

_PLAIN = {Tensor, nn.Parameter, bool, int, float, str, type(None)}  # what is read unpickled


def file_path(path: Any) -> Path:
    """The path of a file.

    Raises:
        TypeError: no path.
        ValueError: a path that names no file.
    """
    of_kind(str | os.PathLike, "the path of a file", path=path)
    if not Path(path).name or "\0" in str(path):
        raise ValueError(f"path must name a file, got {os.fspath(path)!r}")
    return Path(path)


def atomically(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Call ``write`` with a temporary path in the same folder, then move the file into place.

    Raises:
        OSError: it cannot be written; a full disk is an error of another kind in each library.
    """
    target = file_path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, target)
    except (NotImplementedError, RecursionError):
        raise
    except (OSError, RuntimeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
        kind = type(error) if isinstance(error, OSError) else OSError
        named = kind(
            f"{target} cannot be written ({reason}); make room on the disk, or write elsewhere. A "
            "file that was there is as it was"
        )
        named.errno = getattr(error, "errno", None)
        raise named from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def save_plain(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write tensors and plain values, nested in dicts, lists and tuples; see `load_plain`."""
    atomically(path, lambda temporary: torch.save(content, temporary))


def check_plain(value: Any, where: str) -> None:
    """Refuse on writing what could not be read again."""
    if isinstance(value, dict) and type(value) in (dict, OrderedDict, Counter):
        for name, item in value.items():
            check_plain(item, f"{where}[{name!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
    elif type(value) not in _PLAIN:
        raise TypeError(
            f"{where} must be a tensor or a plain value, which are read without unpickling, got "
            f"{type(value).__name__}; have state_dict give such values"
        )


def load_plain(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save_plain` wrote, onto the CPU, unpickling nothing.

    Raises:
        Exception: of several kinds, for a damaged file, even one that torch would read.
    """
    with zipfile.ZipFile(path) as file:
        if file.testzip() is not None:
            raise zipfile.BadZipFile("wrong checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_csv(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV with the union of their columns, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    atomically(path, write)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write indented JSON; numbers that are not finite become null, as JSON has none."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text, whole or not at all."""
    atomically(path, lambda temporary: temporary.write_text(text))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
