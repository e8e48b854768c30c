"""Chat templates, in the sandbox that transformers renders them in: they come with checkpoints, so they are somebody else's code."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any


def render(template: str, conversation: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text of a conversation. ValueError says what the template refuses, or what is wrong with it or with the messages."""
    from jinja2 import TemplateError

    messages = [_message(message, index) for index, message in enumerate(conversation)]
    try:
        return _compiled(template).render(messages=messages, **variables)
    except (TemplateError, TypeError) as error:     # a TypeError: such as "text" + a list
        raise ValueError(f"the chat template: {error}") from error


def _message(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"conversation[{index}]: expected a dictionary with a role and a content, got {message!r}")
    return json.loads(json.dumps(dict(message)))       # plain data: nothing of the caller's is within a template's reach


@cache
def _compiled(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant said, for training; here it is text like any other."""
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json     # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)
