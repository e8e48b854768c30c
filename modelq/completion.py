"""`modelq completion bash|zsh|fish`: the shell's own way of completing words, made of the parsers. Nothing is asked at completion time."""
from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from modelq.parsers import parsers

FILES, FOLDERS, NOTHING = "files", "folders", "nothing"
# What an option or a place takes, by its flag; those with choices say so themselves.
KNOWN_VALUES = {"--format": "formats", "--formats": "formats", "--algorithm": "algorithms", "--calib": FILES, "--dataset": FILES,
                "--text": FILES, "--source": FILES, "source": FILES, "first": FILES, "second": FILES}


class Words(NamedTuple):
    """values: the words that fit, or FILES, FOLDERS, NOTHING."""
    flag: str
    help: str
    values: tuple[str, ...] | str
    takes_value: bool
    again: bool = False


def completion(args: Namespace) -> Any:
    from modelq.commands import Report

    script = {"bash": bash, "zsh": zsh, "fish": fish}[args.shell]({name: words_of(parser) for name, parser in parsers().items()})
    return Report({}, [script.rstrip("\n")])


def words_of(parser: argparse.ArgumentParser) -> list[Words]:
    return [_words(action, flag) for action in parser._actions for flag in action.option_strings[-1:] or [action.dest]]


def _words(action: argparse.Action, flag: str) -> Words:
    takes = not action.option_strings or action.nargs != 0
    again = action.nargs == "*" or isinstance(action, argparse._AppendAction)
    return Words(flag, " ".join((action.help or "").split()), _values(action, flag), takes, again)


def _values(action: argparse.Action, flag: str) -> tuple[str, ...] | str:
    if action.choices is not None:
        return tuple(map(str, action.choices))
    known = KNOWN_VALUES.get(flag)
    if known == "formats":
        from modelq.choices import PRESETS
        return tuple(PRESETS)
    if known == "algorithms":
        from modelq.algorithms import METHODS
        return tuple(METHODS)
    if known is not None:
        return known
    if action.type is Path:
        return FOLDERS if action.metavar == "DIR" else FILES
    return NOTHING


def _options(words: Iterable[Words]) -> list[Words]:
    return [one for one in words if one.flag.startswith("-")]


def _places(words: Iterable[Words]) -> list[Words]:
    return [one for one in words if not one.flag.startswith("-")]


# bash ----------------------------------------------------------------------------------------------------------------------------

def bash(commands: dict[str, list[Words]]) -> str:
    cases = "".join(_bash_command(name, words) for name, words in commands.items())
    return f"""# bash completion for modelq (modelq completion bash)
_modelq() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="" options="" values="" last i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${{COMP_WORDS[i]}} != -* ]] && command="${{COMP_WORDS[i]}}" && break
    done
    case "$command" in
        "") options="--help --version"; values="{' '.join(commands)}" ;;
{cases}        *) return ;;
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    elif [[ $values == {FOLDERS} ]]; then
        mapfile -t COMPREPLY < <(compgen -d -- "$word")
    elif [[ $values == {FILES} ]]; then
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
    elif [[ $values != {NOTHING} ]]; then
        last="${{word##*,}}"      # of a list with commas
        COMPREPLY=($(compgen -P "${{word%"$last"}}" -W "$values" -- "$last"))
    fi
}}
complete -o filenames -F _modelq modelq
"""


def _bash_command(name: str, words: list[Words]) -> str:
    places = [one.values for one in _places(words)]
    default = _bash_values(places[0]) if places else NOTHING      # where there are several places, all take paths or the first is the word
    lines = [f"        {name})", f'            options="{" ".join(one.flag for one in _options(words))}"', '            case "$before" in']
    lines += [f'                {one.flag}) values="{_bash_values(one.values)}" ;;' for one in _options(words) if one.takes_value]
    return "\n".join([*lines, f'                *) values="{default}" ;;', "            esac ;;\n"])


def _bash_values(values: tuple[str, ...] | str) -> str:
    return values if isinstance(values, str) else " ".join(values)


# zsh -----------------------------------------------------------------------------------------------------------------------------

ZSH_ACTIONS = {FILES: "_files", FOLDERS: "_files -/", NOTHING: " "}


def zsh(commands: dict[str, list[Words]]) -> str:
    from modelq.parsers import COMMANDS

    described = "\n".join(f"        {_zsh_quote(f'{command.name}:{command.help}')}" for command in COMMANDS)
    cases = "".join(f"        {name})\n            _arguments \\\n" + " \\\n".join(
        f"                {_zsh_quote(_zsh_argument(one, place))}" for place, one in enumerate(words)) + " ;;\n"
        for name, words in commands.items())
    return f"""#compdef modelq
# zsh completion for modelq (modelq completion zsh)
_modelq() {{
    local context state line
    local -a commands=(
{described}
    )
    _arguments -C '1: :->command' '*:: :->arguments'
    if [[ $state == command ]]; then
        _describe command commands
        return
    fi
    case "$line[1]" in
{cases}    esac
}}
if [[ $funcstack[1] == _modelq ]]; then    # read from a folder of $fpath: this is the first completion
    _modelq "$@"
else
    compdef _modelq modelq
fi
"""


def _zsh_argument(one: Words, place: int) -> str:
    action = ZSH_ACTIONS[one.values] if isinstance(one.values, str) else f"({' '.join(one.values)})"
    help = "".join("\\" + letter if letter in "[]:\\" else letter for letter in one.help)
    if not one.flag.startswith("-"):
        return f"{'*' if one.again else ''}:{one.flag}:{action}"
    value = f":{one.flag.lstrip('-')}:{action}" if one.takes_value else ""
    return f"{'*' if one.again else ''}{one.flag}[{help}]{value}"


def _zsh_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# fish ----------------------------------------------------------------------------------------------------------------------------

def fish(commands: dict[str, list[Words]]) -> str:
    from modelq.parsers import COMMANDS

    lines = ["# fish completion for modelq (modelq completion fish)", "complete -c modelq -f",
             "complete -c modelq -n __fish_use_subcommand -l version -d 'print the version'"]
    lines += [f"complete -c modelq -n __fish_use_subcommand -a {command.name} -d {_fish_quote(command.help)}" for command in COMMANDS]
    for name, words in commands.items():
        where = f"complete -c modelq -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{where} -l {one.flag.lstrip('-')}{_fish_values(one)} -d {_fish_quote(one.help)}" for one in _options(words)]
        lines += [f"{where}{_fish_values(one, place=True)}" for one in _places(words)[:1]]
    return "\n".join(lines) + "\n"


def _fish_values(one: Words, place: bool = False) -> str:
    if not one.takes_value:
        return ""
    required = "" if place else " -r"
    if isinstance(one.values, str):
        return {FILES: f"{required} -F", FOLDERS: f"{required} -a '(__fish_complete_directories)'", NOTHING: required}[one.values]
    return f"{required} -a {_fish_quote(' '.join(one.values))}"


def _fish_quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
