"""Judges of what f and z hold, for the study of global features."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Row
from torch import Tensor
from torch.distributions import kl_divergence

from inference import LinearProbe, seeded
from inference.audit import audit
from inference.modes import evaluating
from inference.recurrent_probes import Paths, RecurrentProbe, sequence_paths
from inference.verification import equal_error_rate
from pyro_avrnn import recipes
from pyro_avrnn.data import Dataset, Sequences
from pyro_avrnn.data.sprites import sprite_labels
from pyro_avrnn.data.strings import StringLabels, labels, string_labels
from pyro_avrnn.exchange import redraw, swap_f
from pyro_avrnn.pair_critics import PairCritic

Names = dict[str, np.ndarray]  #: labels of sequences, by what they name
PIECE = 0.2  # seconds of speech that a code of verification is of


class Judge:
    """What is asked of a row; probes of real data are fitted once.

    Args:
        data: that the rows were trained on.
        few: whether to train probes and critics for a moment only.
    """

    def __init__(self, data: Dataset, few: bool) -> None:
        self.data, self.few = data, few
        self.epochs, self.steps = (2, 30) if few else (30, 1000)

    def probe(self, paths: Tensor, part: Sequences, names: Any) -> RecurrentProbe:
        """A recurrent probe of paths of a part."""
        return RecurrentProbe(paths, part.mask, names, epochs=self.epochs)

    def held(self, train: Paths, test: Paths, known: Names, asked: Names) -> Row:
        """How often each label is read from f, and from the path of z."""
        found: Row = {}
        for name in known:
            reads = LinearProbe(train.f, known[name])
            found[f"{name} from f"] = reads.score(test.f, asked[name]).accuracy
            path = self.probe(train.z, self.data.train, known[name])
            score = path.score(test.z, self.data.test.mask, asked[name])
            found[f"{name} from z"] = score.accuracy
        return found

    def __call__(self, r: recipes.Recipe, seed: int) -> Row:
        """All numbers of a trained row."""
        train, test = self.data.train, self.data.test
        codes = {
            part: sequence_paths(r.model, r.guide, part.x, part.mask, seed=seed)
            for part in (train, test)
        }
        with seeded(seed):
            critic = PairCritic(r.model.z_dim, r.model.f_dim, 128)
        sides = [(codes[part], part.mask) for part in (train, test)]
        found = audit(critic, *sides, steps=self.steps, seed=seed)
        row: Row = {f"audit_{name}": value for name, value in found._asdict().items()}
        with torch.no_grad(), seeded(seed), evaluating(r.model, r.guide):
            d = r.model.rollout(r.guide, test.x, test.mask)
            row["kl_f_per_sequence"] = float(kl_divergence(d.proposal_f, d.prior_f).mean())
        return row | self.ask(r, codes[train], codes[test], seed)

    def ask(self, r: recipes.Recipe, train: Paths, test: Paths, seed: int) -> Row:
        """What codes and emitted sequences tell of the labels."""
        raise NotImplementedError


class Digits(Judge):
    """Single digits: speaker and digit of each recording."""

    def __init__(self, data: Dataset, few: bool) -> None:
        super().__init__(data, few)
        self.known, self.asked = (
            dict(zip(("digit", "speaker"), labels(part), strict=True))
            for part in (data.train, data.test)
        )
        self.judges = {k: self.probe(data.train.x, data.train, v) for k, v in self.known.items()}

    def ask(self, r: recipes.Recipe, train: Paths, test: Paths, seed: int) -> Row:
        """Probes of f and z, and swaps of f between speakers."""
        part = self.data.test
        found = self.held(train, test, self.known, self.asked)
        for name, judge in self.judges.items():
            score = judge.score(part.x, part.mask, self.asked[name])
            found[f"{name} of real frames"] = score.accuracy
        random = np.random.default_rng(seed)
        digits, speakers = self.asked["digit"], self.asked["speaker"]
        alike = digits == digits[:, None]
        for name, fits in (("same", alike), ("different", ~alike)):
            others = fits & (speakers != speakers[:, None])
            order = np.array([random.choice(np.flatnonzero(row)) for row in others])
            x = swapped(r, part, order, seed)
            voice = self.judges["speaker"].predict(x, part.mask) == speakers[order]
            said = self.judges["digit"].predict(x, part.mask) == digits
            found[name] = float((voice & said).mean())
            found[f"voice, {name}"] = float(voice.mean())
        return found


class Strings(Judge):
    """Strings of digits: the speaker of each, and the digit of each frame."""

    def __init__(self, data: Dataset, few: bool) -> None:
        super().__init__(data, few)
        self.known, self.asked = string_labels(data.train), string_labels(data.test)
        self.frames = [
            of.of_frames(part.mask)
            for of, part in ((self.known, data.train), (self.asked, data.test))
        ]
        self.speaker = self.probe(data.train.x, data.train, self.known.speakers)
        self.digit = self.probe(data.train.x, data.train, self.frames[0])

    def ask(self, r: recipes.Recipe, train: Paths, test: Paths, seed: int) -> Row:
        """Probes of f and z, and swaps of f between speakers."""
        part, known, asked = self.data.test, self.known, self.asked
        speakers = [{"speaker": of.speakers} for of in (known, asked)]
        found = self.held(train, test, *speakers)
        of_z = self.probe(train.z, self.data.train, self.frames[0])
        found["digit from z"] = float(said(of_z, test.z, part.mask, asked).mean())
        found["speaker of real frames"] = self.speaker.score(
            part.x, part.mask, asked.speakers
        ).accuracy
        found["digit of real frames"] = float(said(self.digit, part.x, part.mask, asked).mean())
        random = np.random.default_rng(seed)
        others = asked.speakers != asked.speakers[:, None]
        order = np.array([random.choice(np.flatnonzero(row)) for row in others])
        x = swapped(r, part, order, seed)
        voice = self.speaker.predict(x, part.mask) == asked.speakers[order]
        right = said(self.digit, x, part.mask, asked)
        of_string = np.repeat(voice, [len(digits) for digits in asked.digits])
        found["different"] = float((of_string & right).mean())
        found["voice, different"] = float(voice.mean())
        found["digit, different"] = float(right.mean())
        return found


def said(probe: RecurrentProbe, paths: Tensor, mask: Tensor, asked: StringLabels) -> np.ndarray:
    """Whether each digit of each string is found, by a vote of its frames."""
    votes = probe.log_probabilities(paths, mask).cpu().numpy()
    right = []
    for row, digits, ends in zip(votes, asked.digits, asked.ends, strict=True):
        for digit, start, end in zip(digits, [0, *ends], ends, strict=False):
            right.append(probe.classes[row[start:end].sum(axis=0).argmax()] == digit)
    return np.array(right)


class Sprites(Judge):
    """Sprites: four attributes that stay, and an action."""

    def __init__(self, data: Dataset, few: bool) -> None:
        super().__init__(data, few)
        self.known, self.asked = sprite_labels(data.train), sprite_labels(data.test)
        self.judges = {k: self.probe(data.train.x, data.train, v) for k, v in self.known.items()}

    def ask(self, r: recipes.Recipe, train: Paths, test: Paths, seed: int) -> Row:
        """Probes of f and z, and one of them drawn from its prior."""
        part = self.data.test
        found = self.held(train, test, self.known, self.asked)
        for what in ("f", "z"):
            with seeded(seed):
                x = redraw(r.model, r.guide, part.x, what, part.mask)
            for name, judge in self.judges.items():
                score = judge.score(x, part.mask, self.asked[name])
                found[f"{name}, {what} redrawn"] = score.accuracy
        return found


class Speech(Judge):
    """Speech of speakers that training has not heard: verification."""

    def ask(self, r: recipes.Recipe, train: Paths, test: Paths, seed: int) -> Row:
        """Equal error rates by f, and by the average of z."""
        pieces = self.pieces(self.data.test)
        names = np.array([name.split("/")[0].split("-")[0] for name in pieces.names])
        if self.data.name == "timit":  # dr8-fabc/sx3
            names = np.array([name.split("/")[0] for name in pieces.names])
        codes = sequence_paths(r.model, r.guide, pieces.x, pieces.mask, seed=seed)
        static = equal_error_rate(codes.f, names).rate
        dynamic = equal_error_rate(codes.z.mean(dim=1), names).rate
        return {"EER by f": static, "EER by z": dynamic, "gap": dynamic - static}

    def pieces(self, part: Sequences) -> Sequences:
        """Pieces of 200 ms, none shorter."""
        assert self.data.frame_seconds is not None
        size = round(PIECE / self.data.frame_seconds)
        cut = [
            (piece, name)
            for i, name in enumerate(part.names)
            for piece in part.sequence(i).split(size)
            if len(piece) == size
        ]
        return Sequences.from_list([piece for piece, _ in cut], [name for _, name in cut])


JUDGES: dict[str, Callable[[Dataset, bool], Judge]] = {
    "digits": Digits,
    "digits-strings": Strings,
    "sprites": Sprites,
    "timit": Speech,
    "librispeech": Speech,
}


def swapped(r: recipes.Recipe, part: Sequences, order: np.ndarray, seed: int) -> Tensor:
    """Sequences emitted with the f of others."""
    with seeded(seed):
        return swap_f(r.model, r.guide, part.x, torch.as_tensor(order), part.mask)
