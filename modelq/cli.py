"""The command line: `modelq COMMAND ...`; modelq.parsers has the table of commands, docs/cli.md describes it.

Bad use and bad input end with exit code 2 and one line on stderr, Ctrl-C with 130, anything unforeseen with 1 (and so does `verify` if it
found errors); MODELQ_DEBUG=1 adds the traceback. Results go to stdout, --json prints them as one JSON object; progress goes to stderr.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from modelq._version import __version__
from modelq.parsers import BAD_USE, COMMANDS, make_parser

UNFORESEEN, INTERRUPTED, CLOSED_PIPE = 1, 130, 141
EXPECTED = (ValueError, OSError, KeyError, ImportError, MemoryError)


def run(args: argparse.Namespace) -> tuple[str, int]:
    """What to print, and the exit code."""
    from modelq.tables import wants_color

    module, _, function = next(command.function for command in COMMANDS if command.name == args.command).partition(".")
    report = getattr(import_module(f"modelq.{module}"), function)(args)
    return as_json(args.command, report.data) if getattr(args, "json", False) else report.text(wants_color()), report.code


def as_json(command: str, data: dict[str, Any]) -> str:
    """One line. Every command's object says whose it is; numbers that JSON has no words for (nan, inf) are null."""
    return json.dumps(_plain({"command": command, "modelq_version": __version__, **data}), default=str, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def one_line(error: BaseException) -> str:
    """What an exception says, on one line: a KeyError without the quotes of str(), an OSError without its number."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def complain(text: str) -> None:
    print(f"modelq: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    debug = os.environ.get("MODELQ_DEBUG", "0") not in ("", "0")
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("ignore", DeprecationWarning)   # advice for those who write code
        try:
            text, code = run(args)
            if text:        # a chat has said all by then
                print(text, flush=True)
            return code
        except KeyboardInterrupt:
            complain("interrupted")
            return INTERRUPTED
        except BrokenPipeError:   # the reader had enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED_PIPE
        except Exception as error:
            if debug:
                raise
            if isinstance(error, EXPECTED):
                complain(one_line(error))
                return BAD_USE
            complain(f"{type(error).__name__}: {one_line(error)} (a bug: MODELQ_DEBUG=1 shows where)")
            return UNFORESEEN


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    complain(f"warning: {' '.join(str(message).split())}")
