"""The command line, ``avrnn`` or ``python -m pyro_avrnn``; here nouns and verbs meet."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pyro_avrnn.cli.compare import compare
from pyro_avrnn.cli.generate import generate_from
from pyro_avrnn.cli.rows import ROWS, Row, parse
from pyro_avrnn.cli.runs import Settings
from pyro_avrnn.data import holds_digits

_EXAMPLES = """\
examples:
  avrnn compare                                   vowels, 1 seed, 1,500 steps a row
  avrnn compare --steps 300 --out runs/short      a quick look
  avrnn compare --data timit.zip --segment 100 --seeds 3
  avrnn compare --data timit.zip --segment 1000 --truncate 100 --schedules elbo joint
  avrnn compare --rows rnn elbo-annealed 'conditional:weight=0>30@0.5' joint+kl
  avrnn compare --data JSB_Chorales.mat --rows elbo-annealed 'fivo:kl=0>1@0.5,dropout=0.1'
  avrnn compare --rows elbo-annealed:model=srnn elbo-annealed:model=dmm,prior=flow
  avrnn compare --schedules joint --views conditional joint trajectory

rows:
{rows}

options of a row, as in 'conditional:weight=0>30@0.5,critic_dim=32' (quote it: > is the shell's):
  kl, weight        a number, or start>stop@fraction of the run
  bound, particles  elbo, iwae or fivo, and its number of particles in training
  dropout           share of x's features hidden from recurrence and guide in training
  activation        relu, elu, silu or tanh, of all hidden layers of model and guide
  lr, weight_decay  where they are not those of the comparison
  view              marginal, trajectory, trajectory_redrawn, conditional, joint
  model             vae, storn, vrnn, srnn, dmm or dsae; h_dim, z_dim: sizes of this row
  guide             filtering, residual, flow, each also as smoothing, smoothing_residual,
                    smoothing_flow; mean_field, mean_field_forward, mean_field_frame;
                    of a dsae also full and factorised
  prior             conditional, standard, gated, mixture, flow
  cell, emission    gru, lstm; normal, bernoulli, mixture, logistic
                    (none of the four given: the model's own, and what the data ask for)
  critic            feedforward or lstm (lstm with another constraint than spectral)
  constraint        spectral, gradient_penalty, clip; strength=..., on=z or all
  standardise       true or false: codes in units of the prior's deviation
  critic_steps, critic_lr, critic_dim, adversarial_lr, detach_state, prior_gradient
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="avrnn",
        description="Sequential latent-variable models, by bounds and by adversarial training.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_compare(commands)
    _add_generate(commands)
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    try:
        if args.command == "generate":
            return _generate(args)
        return _compare(args, shlex.join(["avrnn", *given]))
    except (
        ArithmeticError,
        ImportError,
        NotImplementedError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        if os.environ.get("AVRNN_TRACEBACK"):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"avrnn: error: {first}", file=sys.stderr)
        return 2


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser(
        "generate",
        help="sequences that a trained row makes up: WAV, MIDI or CSV, and a picture",
        description="Draw sequences from a row's model, freely and after the beginning of a\n"
        "test sequence. Speech is written as WAV with spectrograms, piano rolls as\n"
        "MIDI with a picture of them, other data as CSV with lines.",
        epilog="example:\n  avrnn generate runs/music --data JSB_Chorales.mat --count 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, help="the folder of an avrnn compare")
    p.add_argument("--data", default="vowels", help="what the comparison was made from")
    p.add_argument("--row", help="its label in the table (default: best by the validation bound)")
    p.add_argument("--count", type=int, default=2, help="sequences of each kind (default: 2)")
    p.add_argument("--length", type=int, help="steps (default: median of the test sequences)")
    p.add_argument("--prefix", type=int, help="observed steps (default: a quarter of --length)")
    p.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    p.add_argument("--out", type=Path, help="folder to write (default: RUN/generated)")


def _generate(args: argparse.Namespace) -> int:
    files = generate_from(
        args.run,
        args.data,
        row=args.row,
        count=args.count,
        length=args.length,
        prefix=args.prefix,
        seed=args.seed,
        out=args.out,
    )
    print("written: " + ", ".join(map(str, files)))
    return 0


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    listed = "\n".join(f"  {name:<24}{row.says}" for name, row in ROWS.items())
    p = commands.add_parser(
        "compare",
        help="train several rows on one data set and compare them",
        description="Train an RNN, a VRNN by the ELBO and AVRNNs, or any rows, on the same data,\n"
        "score each on held-out sequences, and write a table, metrics, a posterior for\n"
        "ArviZ and pictures.",
        epilog=_EXAMPLES.format(rows=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what to compare")
    what.add_argument(
        "--data",
        default="vowels",
        help="vowels (built in), a folder or .zip of TIMIT or of spoken digits (FSDD), a "
        "piano-roll .mat, your own .npz",
    )
    what.add_argument("--rows", nargs="+", metavar="ROW", help="rows by name, see below")
    what.add_argument(
        "--schedules",
        nargs="+",
        choices=["elbo", "alternating", "joint"],
        default=["elbo", "alternating", "joint"],
        help="schedules to compare, if --rows is not given (the RNN is always there)",
    )
    what.add_argument(
        "--views",
        nargs="+",
        metavar="VIEW",
        default=["conditional", "joint"],
        help="what joint-schedule critics see, if --rows is not given "
        "(default: conditional joint)",
    )
    what.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    what.add_argument("--first-seed", type=int, default=0, help="the first seed (default: 0)")
    what.add_argument("--steps", type=int, default=1500, help="SVI steps a row (default: 1500)")
    what.add_argument("--split", choices=["test", "valid"], default="test", help="what is scored")
    sizes = p.add_argument_group("model and training")
    defaults = Settings()
    sizes.add_argument("--z-dim", type=int, default=defaults.z_dim, help="Z (default: 8)")
    sizes.add_argument("--h-dim", type=int, default=defaults.h_dim, help="H (default: 64)")
    sizes.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default: 64")
    sizes.add_argument("--lr", type=float, default=defaults.lr, help="Adam's (default: 0.002)")
    sizes.add_argument("--lr-decay", action="store_true", help="linear to a tenth over the run")
    sizes.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's (default: 0)")
    sizes.add_argument("--clip-norm", type=float, default=defaults.clip_norm, help="default: 5")
    sizes.add_argument(
        "--min-scale",
        type=float,
        help="floor of a normal emission's scale, in standard deviations of the data "
        "(default: 0.001; 0.01 for TIMIT)",
    )
    sizes.add_argument(
        "--segment",
        type=int,
        help="frames a segment; TIMIT: of all utterances (default: 100); piano rolls: of training "
        "pieces, the others stay whole (default: none is cut)",
    )
    sizes.add_argument(
        "--truncate",
        type=int,
        metavar="STEPS",
        help="for long sequences: an SVI step for each window of so many time steps instead of "
        "one for whole sequences; the state goes on from window to window, the gradient does not "
        "(default: whole sequences)",
    )
    sizes.add_argument(
        "--recompute",
        type=int,
        metavar="STEPS",
        help="for long sequences, to save memory: keep for the backward pass the state of every "
        "so many time steps alone and compute what lies between a second time; the numbers stay "
        "the same (default: keep all)",
    )
    sizes.add_argument(
        "--compile",
        action="store_true",
        help="run the recurrence in compiled chunks, faster where single steps are small; needs "
        "a C++ compiler, and half a minute once",
    )
    sizes.add_argument(
        "--mu-law",
        type=int,
        metavar="BITS",
        help="TIMIT: samples as so many bits of mu-law, scored by a discretised mixture of "
        "logistics in bits a sample, which compare between papers (default: densities)",
    )
    sizes.add_argument("--frame", type=int, help="TIMIT: samples a frame (default: 200)")
    sizes.add_argument(
        "--particles", type=int, default=64, help="K of IWAE and FIVO (default: 64)"
    )
    sizes.add_argument(
        "--validate-by",
        choices=["iwae", "fivo"],
        default="iwae",
        help="the bound, with 16 particles, by which the best parameters are chosen",
    )
    sizes.add_argument("--validate-every", type=int, default=50, help="steps (default: 50)")
    sizes.add_argument("--patience", type=int, help="stop after so many validations in vain")
    where = p.add_argument_group("where and how")
    where.add_argument("--out", type=Path, default=Path("runs/compare"), help="output folder")
    where.add_argument(
        "--jobs",
        type=int,
        default=min(os.cpu_count() or 1, 4),
        help="trainings at the same time, one thread each (default: %(default)s)",
    )
    where.add_argument(
        "--resume", action="store_true", help="keep the rows in --out and train what is missing"
    )


def _compare(args: argparse.Namespace, command: str) -> int:
    counts = ("seeds", "steps", "h_dim", "z_dim", "batch_size", "jobs", "particles")
    for flag in (*counts, "truncate", "recompute"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    for flag, least in (
        ("lr", "more than 0"),
        ("clip_norm", "more than 0"),
        ("weight_decay", "at least 0"),
        ("min_scale", "at least 0"),
    ):
        value = getattr(args, flag)
        if value is not None and not (value > 0.0 or (value == 0.0 and "least" in least)):
            raise ValueError(f"--{flag.replace('_', '-')} must be {least}, got {value:g}")
    folder = Path(args.data).is_dir() or args.data.lower().endswith(".zip")
    timit = folder and not holds_digits(args.data)
    min_scale = args.min_scale
    if min_scale is None:
        min_scale = 0.01 if timit else 0.001
    settings = Settings(
        steps=args.steps,
        batch_size=args.batch_size,
        z_dim=args.z_dim,
        h_dim=args.h_dim,
        min_scale=min_scale,
        lr=args.lr,
        lr_decay=args.lr_decay,
        weight_decay=args.weight_decay,
        clip_norm=args.clip_norm,
        validate_every=args.validate_every,
        patience=args.patience,
        num_particles=args.particles,
        validate_by=args.validate_by,
        split=args.split,
        truncate=args.truncate,
        recompute=args.recompute,
        compile=args.compile,
    )
    return compare(
        args.data,
        _rows(args),
        list(range(args.first_seed, args.first_seed + args.seeds)),
        settings,
        args.out,
        options=_options(args, timit),
        jobs=args.jobs,
        resume=args.resume,
        command=command,
    )


def _options(args: argparse.Namespace, timit: bool) -> dict[str, int]:
    """Of the data's reader."""
    speech = {"frame": args.frame, "mu_law": args.mu_law}
    if timit:
        given = {name: value for name, value in speech.items() if value is not None}
        return {"segment": 100 if args.segment is None else args.segment, **given}
    for name, value in speech.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for TIMIT, got --data {args.data}")
    if args.segment is not None and not args.data.lower().endswith(".mat"):
        raise ValueError(f"--segment is for TIMIT and piano rolls (.mat), got --data {args.data}")
    return {} if args.segment is None else {"segment": args.segment}


def _rows(args: argparse.Namespace) -> list[Row]:
    if args.rows:
        return [parse(text) for text in dict.fromkeys(args.rows)]
    names = ["rnn"]
    if "elbo" in args.schedules:
        names += ["elbo", "elbo-annealed"]
    if "alternating" in args.schedules:
        names.append("alternating")
    if "joint" in args.schedules:
        names += [f"{view}{suffix}" for view in args.views for suffix in ("", "+kl")]
    return [parse(name) for name in names]
