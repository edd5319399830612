"""Faults of what goes on: windows, stores of parameters, checkpoints, files."""

from tests.mutations.fault import Fault

TRUNCATION, RESUME = "tests/unit/test_truncation.py", "tests/unit/test_resume.py"
SCORE, FILTER = "tests/statistical/test_gradients.py", "tests/unit/test_particles.py"
PYRO, ARVIZ = "tests/unit/test_plain_pyro.py", "tests/integration/test_arviz.py"

FAULTS = [
    Fault(
        "pyro_avrnn/rollout.py",
        "features of a window begin anew",
        "if start is None or not model.features_go_on:",
        "if True:",
        (TRUNCATION,),
    ),
    Fault(
        "pyro_avrnn/models/srnn.py",
        "d of a window's start is zero",
        "if start is None else start.memory[0]]",
        "if start is None else start.memory[0] * 0.0]",
        (TRUNCATION,),
    ),
    Fault(
        "pyro_avrnn/sequence.py",
        "a loaded store is passed over",
        "if other not in _OWNED:",
        "if False:",
        (PYRO,),
    ),
    Fault(
        "pyro_avrnn/sequence.py",
        "a trained module's tensors pass for loaded ones",
        "        _OWNED[parameter] = True\n",
        "",
        (PYRO,),
    ),
    Fault(
        "pyro_avrnn/sequence.py",
        "a jit trace keeps its first mask",
        "if torch.jit.is_tracing():",
        "if False:",
        ("tests/unit/test_user_programs.py",),
    ),
    Fault(
        "inference/bounds.py",
        "a stretch that ended is not counted",
        "done = torch.where(resampled[t], rows[-1], done)",
        "done = done",
        (FILTER,),
    ),
    Fault(
        "inference/gradients.py",
        "what is expected is added",
        "surprise = path[-1] - path - expected",
        "surprise = path[-1] - path + expected",
        (FILTER,),
    ),
    Fault(
        "inference/objectives.py",
        "the other filter is this one",
        "select = Selection(self.resampler, criterion, mask, weight)",
        "select = Selection(self.resampler, criterion, mask, weight); return densities",
        (SCORE,),
    ),
    Fault(
        "inference/objectives.py",
        "what is expected is all of it, not what is to come",
        "self._expected = path[-1] - path",
        "self._expected = path",
        (SCORE,),
    ),
    Fault(
        "inference/checkpoints.py",
        "only the first batch is asked for parameters",
        'if not stored or content["parameters"].keys() - stored:',
        "if not stored:",
        (RESUME,),
    ),
    Fault(
        "inference/batches.py",
        "the pass before is not looked at",
        'self.batches.epoch, self.passes = state["epoch"] - 1, state["passes"] - 2',
        'self.batches.epoch, self.passes = state["epoch"], state["passes"] - 1',
        (RESUME,),
    ),
    Fault(
        "inference/arviz_adapter.py",
        "features of a frame have the likelihood of another",
        "return emission.base_dist.log_prob(x[0, :, None, None])",
        "return emission.base_dist.log_prob(x[0, :, None, None].flip(-1))",
        (ARVIZ,),
    ),
    Fault(
        "inference/files.py",
        "errors of libraries leave as they are",
        "except (OSError, RuntimeError) as error:",
        "except PermissionError as error:",
        ("tests/unit/test_full_disk.py",),
    ),
    Fault(
        "pyro_avrnn/plots/rates.py",
        "a mismatch below zero lengthens the bar",
        "(information[i][0] + below, full)",
        "(information[i][0], full)",
        ("tests/unit/test_plots.py",),
    ),
]
