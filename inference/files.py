"""Files of a run: parameters and metrics, written atomically, read without unpickling."""

import csv
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def save_parameters(
    path: str | os.PathLike[str], parameters: dict[str, Tensor], about: dict[str, Any] | None
) -> None:
    """Write named tensors and plain values beside them, atomically."""
    content = {"about": about or {}, "parameters": parameters}
    atomically(path, lambda temporary: torch.save(content, temporary))


def load_parameters(path: str | os.PathLike[str], model: Any, guide: Any) -> dict[str, Any]:
    """Load what ``fit(save_to=...)`` wrote into a model and guide that are modules.

    Nothing is unpickled: tensors and plain values only.

    Returns:
        The plain values stored beside the parameters.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, a damaged one, or one of other modules.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no parameters at {path}; give a file that fit(save_to=) wrote")
    try:
        content = load_plain(path)
        states = []
        for prefix, module in (("model", model), ("guide", guide)):
            state = {
                name.removeprefix(f"{prefix}$$$"): value
                for name, value in content["parameters"].items()
                if name.startswith(f"{prefix}$$$")
            }
            here = {name: value.shape for name, value in module.named_parameters()}
            if here != {name: value.shape for name, value in state.items()}:
                raise ValueError(f"another {prefix}")
            states.append((module, state))
        for module, state in states:  # both fit: nothing is left half loaded
            module.load_state_dict(state, strict=False)
    except Exception as error:
        raise ValueError(
            f"{path} does not hold parameters of this model and guide, or is damaged "
            f"({type(error).__name__}); give a file that fit(save_to=) wrote for them"
        ) from error
    return content["about"]


def load_plain(path: str | os.PathLike[str]) -> Any:
    """Tensors and plain values of a file of ``torch.save``, nothing unpickled, on the CPU.

    Raises:
        Exception: of several kinds, a damaged file; changed bytes too, which torch reads.
    """
    with zipfile.ZipFile(path) as file:
        if file.testzip() is not None:
            raise zipfile.BadZipFile("wrong checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_csv(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV with the union of their columns, in order of appearance, atomically."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    atomically(path, write)


def atomically(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then move the file into place."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(str(temporary))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
