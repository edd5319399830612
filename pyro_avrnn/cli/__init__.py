"""The command line, ``avrnn`` or ``python -m pyro_avrnn``."""

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_avrnn.cli import compare, generate, refine, tune
from pyro_avrnn.cli.comparison import Comparison
from pyro_avrnn.cli.generate import Generation
from pyro_avrnn.cli.options import add_options, listed, read
from pyro_avrnn.cli.refine import Refining
from pyro_avrnn.cli.rows import ROWS
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.training import Training
from pyro_avrnn.cli.tune import Search

_BAD_INPUT = (ArithmeticError, ImportError, NotImplementedError, OSError, TypeError, ValueError)
_COMPARE = """\
Train an RNN, VRNNs and AVRNNs, or rows of your choice, on the same data.
Score each on held-out sequences; write a table, metrics, pictures, and a posterior for ArviZ."""
_ROWS = """\
examples:
  avrnn compare                                   vowels, 1 seed, 1,500 steps a row
  avrnn compare --steps 300 --out runs/short      a first look
  avrnn compare --data timit.zip --segment 100 --seeds 3
  avrnn compare --data timit.zip --segment 1000 --truncate 100 --schedules elbo joint
  avrnn compare --rows rnn elbo-annealed 'conditional:weight=0>30@0.5' joint+kl
  avrnn compare --data JSB_Chorales.mat --rows elbo-annealed 'fivo:kl=0>1@0.5,dropout=0.1'
  avrnn compare --rows elbo-annealed:model=srnn elbo-annealed:model=dmm,prior=flow
  avrnn compare --schedules joint --views conditional joint trajectory

rows:
{rows}

options of a row, as in 'conditional:weight=0>30@0.5,critic_dim=32' (quote it: > is the shell's);
a default holds where the row sets nothing else:
{options}
"""
_TUNE = """\
Try the same random candidates for every row, with a seed of their own, and judge them by the
validation bound. Writes candidates.csv, a table, and rows.txt with the winners, for
  avrnn compare --rows @runs/tune/rows.txt"""
_REFINE = """\
Put a critic into the prior of each trained row: a network learns where the guide's codes are and
the prior's are not, and the prior draws several candidates and keeps one by it. Nothing else is
changed. Writes a table of the bounds before and after, and the refined parameters."""
_GENERATE = """\
Draw sequences from a trained model: freely, and after the beginning of a test sequence.
Speech is written as WAV with spectrograms, piano rolls as MIDI with a picture of them,
other data as CSV with a picture of lines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input is one sentence on stderr and exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(given)
    try:
        with _terminable():
            return args.call(args, shlex.join(["avrnn", *given]))
    except KeyboardInterrupt:
        print("avrnn: interrupted", file=sys.stderr)
        return 130
    except _BAD_INPUT as error:
        if os.environ.get("AVRNN_TRACEBACK"):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"avrnn: error: {first}", file=sys.stderr)
        return 2


@contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM as the keyboard's interrupt, in the main thread."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="avrnn",
        description="Train, compare and sample latent-variable models of sequences.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (call, words, text, epilog, options) in _commands().items():
        command = commands.add_parser(
            name,
            help=words,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            fromfile_prefix_chars="@",
        )
        command.set_defaults(call=call)
        for title, cls in options.items():
            add_options(command, cls, title)
    return parser


def _compare(args: argparse.Namespace, command: str) -> int:
    comparison = read(Comparison, args)
    return compare.compare(comparison, _settings(args, comparison), command)


def _tune(args: argparse.Namespace, command: str) -> int:
    comparison = read(Comparison, args, out=Path("runs/tune"), first_seed=100)
    few = {"num_particles": 16}  # the search looks at the validation bound alone
    return tune.tune(read(Search, args), comparison, _settings(args, comparison, **few), command)


def _refine(args: argparse.Namespace, command: str) -> int:
    return refine.refine_rows(read(Refining, args), command)


def _settings(args: argparse.Namespace, comparison: Comparison, **own: Any) -> Settings:
    return read(Settings, args, **own, **({"min_scale": 0.01} if comparison.is_speech else {}))


def _generate(args: argparse.Namespace, command: str) -> int:
    files = generate.generate_files(read(Generation, args))
    print("written: " + ", ".join(map(str, files)))
    return 0


def _commands() -> dict[str, tuple[Any, str, str, str, dict[str, type]]]:
    """Call, help, description, epilog and groups of options, by name."""
    rows = "\n".join(f"  {name:<24}{training.summary}" for name, training in ROWS.items())
    compared: dict[str, type] = {
        "what to compare, and where": Comparison,
        "models, training and scoring": Settings,
    }
    return {
        "compare": (
            _compare,
            "train several rows on one data set and compare them",
            _COMPARE,
            _ROWS.format(rows=rows, options=listed(Training)),
            compared,
        ),
        "tune": (
            _tune,
            "search for the settings of rows, the same search for each",
            _TUNE,
            "example:\n  avrnn tune --data timit.zip --rows rnn elbo-annealed --trials 8",
            {"the search": Search, **compared},
        ),
        "refine": (
            _refine,
            "improve the priors of trained rows by a critic",
            _REFINE,
            "example:\n  avrnn refine runs/timit --data timit.zip --candidates 16 64",
            {"what to refine": Refining},
        ),
        "generate": (
            _generate,
            "draw sequences from a trained row: WAV, MIDI or CSV, and a picture",
            _GENERATE,
            "example:\n  avrnn generate runs/music --data JSB_Chorales.mat --count 3",
            {"what to draw": Generation},
        ),
    }
