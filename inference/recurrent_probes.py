"""Recurrent probes: which labels can be read from a path, in the order of its steps.

An average over steps hides what the order says: on spoken digits a linear probe of averaged z
reads the speaker at 0.73, where a GRU on z reads it at 0.91. To show that z does *not* hold a
label takes the stronger probe. Trained on data, a probe is the judge of emitted sequences, too.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.batches import by_portions
from inference.densities import check_batch, check_mask, require_steps
from inference.modes import evaluating
from inference.probes import Accuracy, Values, accuracy_of, labels_of
from inference.protocols import Program, counts, require_programs
from inference.random import seeded
from inference.traces import step_densities


class Paths(NamedTuple):
    """One draw of the guide for B sequences; f is None for a model without it."""

    f: Tensor | None  # (B, F)
    z: Tensor  # (B, T, Z)


@torch.no_grad()
def sequence_paths(
    model: Program,
    guide: Program,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> Paths:
    """Draw f and z_{1:T} of each sequence in one pass of the guide, in evaluation mode.

    Args:
        model, guide: Pyro programs, best with a rollout.
        x, mask: ``(B, T, X)``, and ``(B, T)`` bool, a prefix, or None.
        batch_size: sequences at once; it changes the draws.
        seed: seed of all draws.

    Raises:
        ValueError: a number below 1, or a sequence without steps.
    """
    counts(1, batch_size=batch_size)
    require_programs(model, guide)
    x, mask = check_batch(model, x, mask)
    require_steps(mask)

    longest = mask.shape[1]

    def drawn(x: Tensor, mask: Tensor) -> dict[str, Tensor]:  # portions end with their longest
        d = step_densities(model, guide, x, mask)
        padded = d.z.new_zeros(len(x), longest, d.z.shape[-1])
        padded[:, : mask.shape[1]] = d.z[:, 0].transpose(0, 1) * mask.unsqueeze(-1)
        found = {"z": padded}
        return found if d.f is None else found | {"f": d.f[0]}

    with seeded(seed), evaluating(model, guide):
        columns = by_portions(drawn, x, mask, batch_size)
    return Paths(columns.get("f"), columns["z"])


class RecurrentProbe:
    """A bidirectional GRU that reads labels from paths: one a sequence, or one a step.

    A tenth of the sequences is kept aside; the parameters that read it best are kept.

    Args:
        paths: ``(N, T, D)``, of the sequences it is fitted on; each dimension is standardised.
        mask: ``(N, T)`` bool, a prefix.
        labels: ``(N,)``, integers or strings, or integers ``(N, T)``, where those at padded steps
            say nothing; of two classes at least.
        width: of the GRU in each direction.
        epochs: passes over the data.
        dropout: probability of zeroing a value of a path while it learns.
        seed: of weights, order and dropout.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, one class, or fewer than
            ten sequences.
    """

    def __init__(
        self,
        paths: Tensor,
        mask: Tensor,
        labels: Values,
        *,
        width: int = 64,
        epochs: int = 30,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        counts(1, width=width, epochs=epochs)
        rows = _paths(paths, mask)
        if len(rows) < 10:
            raise ValueError(f"paths must hold at least ten sequences, got {len(rows)}")
        self.by_step = np.ndim(labels) == 2
        names = labels_of(labels, tuple(mask.shape) if self.by_step else (len(rows),))
        seen = names[mask.cpu().numpy()] if self.by_step else names
        self.classes = np.unique(seen)
        if len(self.classes) < 2:
            raise ValueError(
                f"labels must be of two classes at least, got {self.classes.tolist()}"
            )
        where = np.searchsorted(self.classes, names).clip(max=len(self.classes) - 1)
        targets = torch.as_tensor(where, device=rows.device)
        frames = rows[mask]
        self.mean, deviation = frames.mean(dim=0), frames.std(dim=0)
        # a dimension that never changes here may change a little in paths that are judged later
        self.deviation = deviation.clamp(min=0.1 * float(deviation.mean()) + 1e-6)
        with seeded(seed):
            self.net = _Reader(rows.shape[-1], width, len(self.classes), dropout).to(rows)
            self._fit(rows, mask, targets, epochs)

    def _fit(self, rows: Tensor, mask: Tensor, targets: Tensor, epochs: int) -> None:
        order = torch.randperm(len(rows))
        aside, fitted = order[: len(rows) // 10], order[len(rows) // 10 :]
        optim = torch.optim.AdamW(self.net.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = -(-len(fitted) // 32) * epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
        best, least = self.net.state_dict(), float("inf")
        for _ in range(epochs):
            self.net.train()
            for batch in fitted[torch.randperm(len(fitted))].split(32):
                optim.zero_grad(set_to_none=True)
                self._loss(rows[batch], mask[batch], targets[batch]).backward()
                optim.step()
                schedule.step()
            self.net.eval()
            with torch.no_grad():
                loss = float(self._loss(rows[aside], mask[aside], targets[aside]))
            if loss < least:
                least, best = loss, {k: v.clone() for k, v in self.net.state_dict().items()}
        self.net.load_state_dict(best)

    def _loss(self, rows: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(rows, mask)
        if self.by_step:
            return F.cross_entropy(logits[mask], targets[mask])
        return F.cross_entropy(logits, targets)

    def _logits(self, rows: Tensor, mask: Tensor) -> Tensor:
        standard = (rows - self.mean) / self.deviation * mask.unsqueeze(-1)
        by_step: Tensor = self.net(standard, mask)
        if self.by_step:
            return by_step
        share = mask.to(rows) / mask.sum(dim=1, keepdim=True)
        return (share.unsqueeze(-1) * by_step).sum(dim=1)

    @torch.no_grad()
    def log_probabilities(self, paths: Tensor, mask: Tensor) -> Tensor:
        """Of each class, ``(N, C)``, or ``(N, T, C)`` of a probe of steps."""
        rows = _paths(paths, mask)
        portions = zip(rows.split(256), mask.split(256), strict=True)
        return torch.cat([self._logits(*portion).log_softmax(dim=-1) for portion in portions])

    def predict(self, paths: Tensor, mask: Tensor) -> np.ndarray:
        """Predict the labels, ``(N,)`` or ``(N, T)``."""
        found: np.ndarray = self.classes[self.log_probabilities(paths, mask).argmax(-1).cpu()]
        return found

    def score(self, paths: Tensor, mask: Tensor, labels: Values) -> Accuracy:
        """Measure how many of the labels it predicts, of sequences or of observed steps.

        The standard error of steps is too small, as the steps of a sequence are alike.

        Raises:
            ValueError: shapes that do not fit, or a label that it was not fitted on.
        """
        found = self.predict(paths, mask)
        names = labels_of(labels, found.shape)
        if self.by_step:
            keep = mask.cpu().numpy()
            found, names = found[keep], names[keep]
        return accuracy_of(found, names, self.classes)


class _Reader(nn.Module):
    """Logits of each step by a GRU in both directions."""

    def __init__(self, in_dim: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.gru = nn.GRU(in_dim, width, batch_first=True, bidirectional=True)
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(2 * width, classes)

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(rows), mask.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False
        )
        outputs, _ = nn.utils.rnn.pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=rows.shape[1]
        )
        return self.out(outputs)


def _paths(paths: Tensor, mask: Tensor) -> Tensor:
    if not isinstance(paths, Tensor) or paths.ndim != 3 or not paths.is_floating_point():
        raise ValueError(
            "paths must be a floating tensor (N, T, D), got "
            f"{tuple(paths.shape) if isinstance(paths, Tensor) else type(paths).__name__}"
        )
    require_steps(check_mask(mask, paths.shape[:2]))
    rows = torch.where(mask.unsqueeze(-1), paths.detach(), 0.0)
    bad = ~rows.isfinite().all(dim=-1).all(dim=-1)
    if bool(bad.any()):
        raise ValueError(
            f"paths must be finite, got a NaN or an infinity for sequence {int(bad.nonzero()[0])} "
            "(counted from 0); leave it out"
        )
    return rows
