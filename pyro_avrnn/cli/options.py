"""Options stated once, as fields of frozen dataclasses: type, default, help, accepted values.

The arguments of ``argparse``, the checks and the help are all read from these fields.
"""

import argparse
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

Options = TypeVar("Options")
_WIDTH = 96  # columns of the options that are listed at the end of the help


class Range(NamedTuple):
    """Numbers that an option accepts; ``words`` complete the sentence "must be ..."."""

    words: str
    holds: Callable[[float], bool]


AT_LEAST_0 = Range("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
MORE_THAN_0 = Range("more than 0", lambda value: value > 0)
SHARE = Range("in [0, 1)", lambda value: 0 <= value < 1)


def option(
    default: Any,
    help: str,
    within: Range | None = None,
    *,
    choices: Iterable[str] = (),
    flag: str | None = None,
) -> Any:
    """Declare a field of a dataclass as an option.

    Args:
        default: of the field; with ``dataclasses.MISSING`` it is a positional argument.
        help: what the option does; the default is added, unless the text mentions it.
        within: numbers it accepts.
        choices: names it accepts; a ``Literal`` brings its own.
        flag: name on the command line, if it is not the field's.
    """
    told = {"help": help, "within": within, "choices": tuple(choices), "flag": flag}
    return field(default=default, metadata=told)


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
    """Refuse a value that the option ``name`` does not accept, with a ``ValueError``.

    ``choices`` take the place of the field's own.
    """
    choices, within = choices or kind_of(f)[1], f.metadata["within"]
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if within is not None and not within.holds(value):
        raise ValueError(f"{name} must be {within.words}, got {value:g}")


def add_options(parser: argparse.ArgumentParser, cls: Any, title: str) -> None:
    """Add the options of a dataclass to a parser, as a group; :func:`read` collects them."""
    group = parser.add_argument_group(title)
    for name, f in options_of(cls).items():
        kind, choices = kind_of(f)
        given: dict[str, Any] = {"help": _help(f), "default": argparse.SUPPRESS}
        if kind is bool:
            given["action"] = "store_true"
        else:
            given |= {"type": kind, "choices": choices or None}
        if get_origin(f.type) is tuple:
            given["nargs"] = "+"
        if f.default is MISSING:
            group.add_argument(name, **given)
        else:
            if kind is not bool and not choices:
                given["metavar"] = kind.__name__.upper()
            group.add_argument(_flag(f), dest=name, **given)


def read(cls: type[Options], args: argparse.Namespace, **defaults: Any) -> Options:
    """Make a dataclass from the options that were given; ``defaults`` replace its own.

    Raises:
        ValueError: a value that an option does not accept.
    """
    for name, f in options_of(cls).items():
        if hasattr(args, name):
            value = getattr(args, name)
            several = isinstance(value, list)
            for single in value if several else [value]:
                check(_flag(f), f, single)
            defaults[name] = tuple(value) if several else value
    return cls(**defaults)


def listed(cls: Any) -> str:
    """The options of a dataclass with their help, for the end of ``--help``."""
    known = options_of(cls)
    indent = 4 + max(map(len, known))
    lines = []
    for name, f in known.items():
        kind, choices = kind_of(f)
        text = _help(f, ("true", "false") if kind is bool else choices)
        first, rest = f"  {name}".ljust(indent), " " * indent
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        )
    return "\n".join(lines)


def _help(f: Field[Any], choices: tuple[str, ...] = ()) -> str:
    """The help with choices, if argparse does not show them, and with the default, if any."""
    text, default = f.metadata["help"], f.default
    notes = [", ".join(choices)] if choices else []
    off = default is False and not choices  # of a flag, this goes without saying
    if not (off or default in (MISSING, None, ()) or "default" in text):
        shown = " ".join(default) if isinstance(default, tuple) else str(default).lower()
        notes.append(f"default: {shown}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def _flag(f: Field[Any]) -> str:
    return "--" + (f.metadata["flag"] or f.name).replace("_", "-")
