"""docs/cli.md, made of the parsers.

    python scripts/cli_page.py > docs/cli.md

tests/test_cli_consistency.py says when that has to be done again.
"""
from __future__ import annotations

import argparse

from modelq.parsers import COMMANDS, EXIT_CODES, parsers

HEAD = """\
# The command line

Made by `python scripts/cli_page.py > docs/cli.md`: do not edit. `modelq COMMAND --help` says the same.

Results go to stdout, progress, warnings and mistakes to stderr. `--json` prints one JSON object on one line instead of text: `command` and
`modelq_version` say whose it is, keys are in snake_case, sizes are bytes, times seconds, and what is no number (nan, inf) is null.
"""


def page() -> str:
    """The whole of docs/cli.md."""
    codes = "".join(f"- {item.strip().rstrip('.')}\n" for part in EXIT_CODES.replace("\n", " ").split(": ", 1)[1].split("environment:")
                    for item in part.split(";"))
    rows = "".join(f"| [`modelq {command.name}`](#modelq-{command.name}) | {command.help} |\n" for command in COMMANDS)
    found = parsers()
    sections = "\n".join(_section(command.name, command.examples, found[command.name]) for command in COMMANDS)
    return f"{HEAD}\nExit codes and environment:\n\n{codes}\n| | |\n| --- | --- |\n{rows}\n{sections}"


def _section(name: str, examples: list[str], parser: argparse.ArgumentParser) -> str:
    rows = "".join(f"| {_cell(_spelled(action))} | {_cell(_help(action))} |\n" for action in parser._actions if action.dest != "help")
    lines = "".join(f"    modelq {line}\n" for line in examples)
    return f"## modelq {name}\n\n{parser.description}\n\n{lines}\n| | |\n| --- | --- |\n{rows}"


def _spelled(action: argparse.Action) -> str:
    value = action.metavar or ("" if action.choices is None else "|".join(map(str, action.choices)))
    value = value if isinstance(value, str) else " ".join(value)
    if not action.option_strings:
        return f"`[{value} ...]`" if action.nargs == "*" else f"`{value}`"
    return f"`{' '.join([action.option_strings[-1], *([value] if action.nargs != 0 else [])])}`"


def _help(action: argparse.Action) -> str:
    needed = " (needed)" if action.option_strings and action.required else ""
    return f"{action.help}{needed}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
