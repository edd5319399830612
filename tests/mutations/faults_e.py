"""Faults of trainings that are not held back: clipping, batches, levels, tuning."""

from tests.mutations.fault import Fault

CLIPPING, RESUME = "tests/unit/test_clipping.py", "tests/unit/test_resume.py"
LEARNING, TUNE = "tests/unit/test_learning.py", "tests/integration/test_tune.py"
TRANSPOSE, LEVELS = "tests/unit/test_transpose.py", "tests/unit/test_levels.py"
SPEECH, ORDERED = "tests/unit/test_speech_readers.py", "tests/unit/test_autoregressive.py"
NETWORKS, ROWS = "tests/unit/test_networks.py", "tests/unit/test_row_settings.py"

FAULTS = [
    Fault(
        "inference/clipping.py",
        "a spike counts in full",
        "self.norms.append(norm * factor)",
        "self.norms.append(norm)",
        (CLIPPING,),
    ),
    Fault(
        "inference/clipping.py",
        "the bound is of the mean",
        "return self.clip.multiple * median(self.norms)",
        "return self.clip.multiple * sum(self.norms) / len(self.norms)",
        (CLIPPING,),
    ),
    Fault(
        "inference/clipping.py",
        "a run that is clipped is not told",
        "self.share <= 0.5:",
        "self.share <= 1.0:",
        (CLIPPING,),
    ),
    Fault(
        "inference/clipping.py",
        "a resumed bound begins anew",
        'self.norms = deque(state["norms"], maxlen=self.norms.maxlen)',
        "self.norms = deque(maxlen=self.norms.maxlen)",
        (
            CLIPPING,
            RESUME,
        ),
    ),
    Fault(
        "inference/averages.py",
        "the average is of the first step",
        "self.values[name].lerp_(p, 1.0 - decay)",
        "self.values[name].lerp_(p, 0.0)",
        (CLIPPING,),
    ),
    Fault(
        "inference/averages.py",
        "what is trained is lost",
        "            self._exchange(trained)",
        "            self._exchange({})",
        (CLIPPING,),
    ),
    Fault(
        "inference/schedules.py",
        "a warm-up ends early",
        "return progress / self.warmup",
        "return min(2.0 * progress / self.warmup, 1.0)",
        (CLIPPING,),
    ),
    Fault(
        "inference/learning.py",
        "a tenth counts as a fifth",
        "if step <= 0.8 * last]",
        "if step <= 0.9 * last]",
        (LEARNING,),
    ),
    Fault(
        "inference/learning.py",
        "one look decides about a unit",
        "low, high = low.minimum(ranges[key][0]), high.maximum(ranges[key][1])",
        "pass",
        (LEARNING,),
    ),
    Fault(
        "inference/learning.py",
        "padding counts in scales",
        "near[d.mask.expand(near.shape)].mean()",
        "near.mean()",
        (LEARNING,),
    ),
    Fault(
        "inference/updates.py",
        "norms of parts are of the batch",
        "return {part: _norm(gradients, frames)",
        "return {part: _norm(gradients, 1.0)",
        (LEARNING,),
    ),
    Fault(
        "pyro_avrnn/data/sequences.py",
        "a rest is a batch",
        "order.tensor_split(count) if self.even else",
        "order.split(self.batch_size) if self.even else",
        (
            CLIPPING,
            TRANSPOSE,
        ),
    ),
    Fault(
        "pyro_avrnn/data/sequences.py",
        "windows are where they were",
        "float(torch.rand((), generator=generator)) - 0.5 if parts > 1",
        "0.0 if parts > 1",
        (
            CLIPPING,
            TRANSPOSE,
        ),
    ),
    Fault(
        "pyro_avrnn/data/sequences.py",
        "padding is transposed",
        "x[i, :length] = self.augment(x[i, :length], generator)",
        "x[i] = self.augment(x[i], generator)",
        (TRANSPOSE,),
    ),
    Fault(
        "pyro_avrnn/data/piano_rolls.py",
        "a note leaves the keyboard",
        "shift = min(max(int(drawn), -lowest), roll.shape[1] - 1 - highest)",
        "shift = int(drawn)",
        (TRANSPOSE,),
    ),
    Fault(
        "pyro_avrnn/data/_speech.py",
        "training utterances are cut",
        '(self.whole and split == "train")',
        "False",
        (SPEECH,),
    ),
    Fault(
        "pyro_avrnn/data/_speech.py",
        "FLAC of segments, not of recordings",
        'files.setdefault(name.split("[")[0], [])',
        "files.setdefault(name, [])",
        (SPEECH,),
    ),
    Fault(
        "pyro_avrnn/logistics.py",
        "cells know no unit",
        "half_cell, end = min_log_scale, 0.5**bits / unit, 1 / unit",
        "half_cell, end = min_log_scale, 0.5**bits, 1 / unit",
        (LEVELS,),
    ),
    Fault(
        "pyro_avrnn/autoregressive.py",
        "a unit reads its own feature",
        "self.mask_read = nn.Buffer(place < known.unsqueeze(1)",
        "self.mask_read = nn.Buffer(place <= known.unsqueeze(1)",
        (ORDERED,),
    ),
    Fault(
        "pyro_avrnn/autoregressive.py",
        "a sample is read for itself",
        "known = F.pad(x[..., start : last - 1], (self.lags - (first - start), 0))",
        "known = F.pad(x[..., start + 1 : last], (self.lags - (first - start), 0))",
        (ORDERED,),
    ),
    Fault(
        "pyro_avrnn/autoregressive.py",
        "draws do not see each other",
        "x[..., one] = self.emission.of_features(x, wide.context",
        "x[..., one] = self.emission.of_features(0 * x, wide.context",
        (ORDERED,),
    ),
    Fault(
        "pyro_avrnn/networks.py",
        "loudness is not read",
        "return super().forward(torch.cat([scaled, size.log()], dim=-1))",
        "return super().forward(torch.cat([scaled, 0 * size], dim=-1))",
        (NETWORKS,),
    ),
    Fault(
        "pyro_avrnn/cli/rows.py",
        "a row's own settings are passed over",
        "shared, **given(**{n: getattr(self, n, None)",
        "shared, **given(**{n: None",
        (ROWS,),
    ),
    Fault(
        "pyro_avrnn/cli/tune.py",
        "rows draw different numbers",
        "RandomSampler(seed=comparison.first_seed)",
        "RandomSampler(seed=len(self.studies))",
        (TUNE,),
    ),
    Fault(
        "pyro_avrnn/cli/tune.py",
        "the worst candidate wins",
        'direction="maximize"',
        'direction="minimize"',
        (TUNE,),
    ),
    Fault(
        "inference/clipping.py",
        "infinite gradients without end",
        "if self._in_a_row >= patience:",
        "if False:",
        (CLIPPING,),
    ),
    Fault(
        "inference/clipping.py",
        "patience of the whole run, not in a row",
        "            self._in_a_row = 0\n            return False",
        "            return False",
        (CLIPPING,),
    ),
]
