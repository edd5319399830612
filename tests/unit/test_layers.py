"""Who imports whom, read from the source; and nothing on disk is ever unpickled."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("inference", "pyro_avrnn")
    for path in (ROOT / package).rglob("*.py")
)
GROUND_FLOOR = {
    f"inference.{name}" for name in ("densities", "protocols", "modes", "files", "random")
}
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Name of every module imported, and whether the import stands inside a function."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.Call) and _called(node) in ("__import__", "import_module"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in names:
            yield name, id(node) in inside


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def faults(path: str, source: str) -> list[str]:
    """What this file does that its place in the layers forbids."""
    tree = ast.parse(source)
    package = path.split("/")[0]
    found = []
    for module, in_function in imports(tree):
        name = module.split(".")[0]
        if name == "":
            found.append("a relative import, which this check cannot follow")
        if package == "inference" and name == "pyro_avrnn":
            found.append("inference imports pyro_avrnn")
        if (
            package == "pyro_avrnn"
            and name == "inference"
            and module not in GROUND_FLOOR
            and not path.startswith(("pyro_avrnn/cli/", "pyro_avrnn/testing/"))
        ):
            found.append("outside cli and testing, pyro_avrnn imports more than the ground floor")
        if path in {f"{floor.replace('.', '/')}.py" for floor in GROUND_FLOOR}:
            if name == "inference" and module not in GROUND_FLOOR:
                found.append("the ground floor imports a floor above")
        allowed = path == "inference/arviz_adapter.py" or (
            path.startswith("pyro_avrnn/plots/") and in_function
        )
        if name.startswith("arviz") and not allowed:
            found.append("imports arviz")
        if name in PICKLERS:
            found.append(f"imports {name}")
    for node in ast.walk(tree):
        if path.startswith("pyro_avrnn/models/") and isinstance(node, ast.ImportFrom | ast.Import):
            known = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            if not path.endswith("__init__.py") and any("pyro_avrnn.models" in n for n in known):
                found.append("a model knows another")
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) == "pyro.sample" and path != "pyro_avrnn/sequence.py":
            found.append("states a Pyro site outside sequence.py")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        pickles = given.get("allow_pickle")
        if pickles is not None and getattr(pickles, "value", True) is not False:
            found.append("allows numpy to unpickle")
        if ast.unparse(node.func) == "torch.load":
            only = given.get("weights_only")
            if getattr(only, "value", None) is not True:
                found.append("torch.load without weights_only=True")
        if _called(node) == "read_pickle":
            found.append("reads a pickle")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += ["imports torch.load by itself" for a in node.names if a.name == "load"]
    return found


@pytest.mark.parametrize("path", FILES)
def test_a_file_keeps_to_its_layer(path: str) -> None:
    assert not faults(path, (ROOT / path).read_text())


def test_all_files_are_read() -> None:
    assert {"inference/training.py", "pyro_avrnn/sequence.py", "pyro_avrnn/cli/runs.py"} < {*FILES}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("inference/training.py", "import pyro_avrnn"),
        ("inference/training.py", "def f():\n    from pyro_avrnn.data import load"),
        ("inference/training.py", "if TYPE_CHECKING:\n    import pyro_avrnn.recipes as r"),
        ("inference/training.py", "import importlib\nimportlib.import_module('pyro_avrnn.data')"),
        ("inference/training.py", "from . import traces"),
        ("pyro_avrnn/sequence.py", "from inference import fit"),
        ("pyro_avrnn/sequence.py", "from inference import densities"),
        ("pyro_avrnn/rollout.py", "from inference.traces import step_densities"),
        ("pyro_avrnn/plots/curves.py", "from inference.particles import Filtered"),
        ("inference/protocols.py", "from inference.bounds import elbo"),
        ("pyro_avrnn/models/vrnn.py", "import numpy, inference.traces"),
        ("pyro_avrnn/clique.py", "import inference"),
        ("inference/evaluation.py", "import arviz as az"),
        ("inference/evaluation.py", "def f():\n    import arviz_base"),
        ("pyro_avrnn/plots/posterior.py", "import arviz as az"),
        ("pyro_avrnn/cli/report.py", "def f():\n    import arviz as az"),
        ("pyro_avrnn/data/npz.py", "import pickle"),
        ("pyro_avrnn/data/npz.py", "from pickle import loads"),
        ("pyro_avrnn/data/npz.py", "np.load(path, allow_pickle=True)"),
        ("pyro_avrnn/data/npz.py", "np.load(path, allow_pickle=flag)"),
        ("inference/training.py", "torch.load(path)"),
        ("inference/training.py", "torch.load(path, weights_only=False)"),
        ("inference/training.py", "torch.load(path, weights_only=safe)"),
        ("inference/training.py", "from torch import load"),
        ("pyro_avrnn/data/npz.py", "pandas.read_pickle(path)"),
        ("pyro_avrnn/models/srnn.py", "from pyro_avrnn.models.vrnn import VRNNState"),
        ("pyro_avrnn/models/srnn.py", "import pyro_avrnn.models.vrnn"),
        ("pyro_avrnn/models/srnn.py", "from pyro_avrnn.models import VRNN"),
        ("pyro_avrnn/models/srnn.py", "pyro.sample('z', prior)"),
    ],
)
def test_the_check_rejects_a_planted_fault(path: str, source: str) -> None:
    assert faults(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("inference/training.py", "from inference.traces import step_densities"),
        ("pyro_avrnn/cli/runs.py", "from inference import fit"),
        ("pyro_avrnn/rollout.py", "from inference.densities import StepDensities"),
        ("inference/protocols.py", "from inference.densities import StepDensities"),
        ("inference/arviz_adapter.py", "import arviz as az"),
        ("pyro_avrnn/plots/posterior.py", "def f():\n    import arviz as az"),
        ("pyro_avrnn/data/npz.py", "np.load(path, allow_pickle=False)"),
        ("inference/training.py", "torch.load(path, weights_only=True)"),
    ],
)
def test_the_check_accepts_what_is_allowed(path: str, source: str) -> None:
    assert not faults(path, source)
