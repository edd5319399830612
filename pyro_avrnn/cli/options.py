"""Options stated once, as fields of frozen dataclasses: type, default, help, accepted values.

The arguments of ``argparse``, the checks and the help are all read from these fields.
"""

import argparse
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Options = TypeVar("Options")
#: numbers that an option may accept, in words that complete the sentence "must be ..."
RANGES = {
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "more than 0": lambda value: value > 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


def option(default: Any, help: str, within: str = "", *, choices: Iterable[str] = ()) -> Any:
    """Declare a field of a dataclass as an option.

    Args:
        default: of the field; with ``dataclasses.MISSING`` it is a positional argument.
        help: what the option does; the default is added, unless the text mentions it.
        within: numbers it accepts, a key of ``RANGES``.
        choices: names it accepts; a ``Literal`` brings its own.
    """
    about = {"help": help, "within": within, "choices": tuple(choices)}
    return field(default=default, metadata=about)


def options_of(cls: Any) -> dict[str, Field[Any]]:
    """Fields of a dataclass that are options, by name."""
    return {f.name: f for f in fields(cls) if "help" in f.metadata}


def kind_of(f: Field[Any]) -> tuple[Any, tuple[str, ...]]:
    """Type of a single value, and the names it may be, where these are limited."""
    kind: Any = f.type
    while get_origin(kind) in (Union, UnionType, tuple):
        members = [part for part in get_args(kind) if part not in (NoneType, Ellipsis)]
        if len(members) > 1:
            break
        kind = members[0]
    return (str, get_args(kind)) if get_origin(kind) is Literal else (kind, f.metadata["choices"])


def check(name: str, f: Field[Any], value: Any, choices: tuple[str, ...] = ()) -> None:
    """Refuse a value that the option ``name`` does not accept.

    Raises:
        ValueError: naming the option and what it accepts: ``choices``, if not the field's own.
    """
    choices, within = choices or kind_of(f)[1], f.metadata["within"]
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if within and not RANGES[within](value):
        raise ValueError(f"{name} must be {within}, got {value:g}")


def add_options(parser: argparse.ArgumentParser, cls: Any, title: str) -> None:
    """Add the options of a dataclass to a parser, as a group; :func:`read` collects them."""
    group = parser.add_argument_group(title)
    for name, f in options_of(cls).items():
        kind, choices = kind_of(f)
        given: dict[str, Any] = {"help": _help(f), "default": argparse.SUPPRESS}
        if f.default is MISSING:
            group.add_argument(name, type=kind, **given)
            continue
        if kind is bool:
            given["action"] = "store_true"
        else:
            metavar = None if choices else kind.__name__.upper()
            given |= {"type": kind, "choices": choices or None, "metavar": metavar}
        if get_origin(f.type) is tuple:
            given["nargs"] = "+"
        group.add_argument(flag_of(f), dest=name, **given)


def read(cls: type[Options], args: argparse.Namespace, **defaults: Any) -> Options:
    """Make a dataclass from the options that were given; ``defaults`` replace its own.

    Raises:
        ValueError: a value that an option does not accept.
    """
    for name, f in options_of(cls).items():
        if hasattr(args, name):
            value = getattr(args, name)
            defaults[name] = tuple(value) if isinstance(value, list) else value
            if not isinstance(value, list):  # whose values argparse has checked
                check(flag_of(f), f, value)
    return cls(**defaults)


def listed(cls: Any) -> str:
    """The options of a dataclass with their help, for the end of ``--help``."""
    lines = []
    for name, f in options_of(cls).items():
        kind, choices = kind_of(f)
        text = f"  {name:<15} {_help(f, ('true', 'false') if kind is bool else choices)}"
        lines += textwrap.wrap(text, 96, subsequent_indent=" " * 18, break_on_hyphens=False)
    return "\n".join(lines)


def _help(f: Field[Any], choices: tuple[str, ...] = ()) -> str:
    """The help with choices, if argparse does not show them, and with the default, if any."""
    text, default = f.metadata["help"], f.default
    notes = [", ".join(choices)] if choices else []
    off = default is False and not choices  # of a flag, this goes without saying
    if not (off or default in (MISSING, None, ()) or "default" in text):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
        notes.append(f"default: {shown}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def flag_of(f: Field[Any]) -> str:
    """The option on the command line."""
    return "--" + f.name.removeprefix("num_").replace("_", "-")
