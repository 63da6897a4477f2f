"""Chat templates: Jinja in a sandbox, as transformers renders them."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier_core.errors import BadRequest, ConfigError

Message = Mapping[str, Any]


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One template of a model. It is the operator's; what it renders comes from users."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` by their names in templates: bos_token, eos_token, ...

        ConfigError if the source is no Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special_tokens = special_tokens
        self._knows_developers = "developer" in source
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for the assistant's next message; BadRequest if the template cannot."""
        try:
            return self._template.render(
                **{
                    **self._special_tokens,
                    "documents": None,
                    **(variables or {}),
                    "messages": [self._message(message) for message in messages],
                    "tools": list(tools) or None,
                    "add_generation_prompt": True,
                }
            )
        # A template works on what users send, of whatever type: any operation of it can fail.
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise BadRequest(f"messages: the model's chat template refuses them: {error}") from None

    def _message(self, message: Message) -> dict[str, Any]:
        if message["role"] == "developer" and not self._knows_developers:
            return {**message, "role": "system"}
        return dict(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
