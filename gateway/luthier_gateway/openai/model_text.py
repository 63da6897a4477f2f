"""A base model's tokenizer and chat template, from files that a sampler has stored; no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tokenizers import Tokenizer

from luthier_core.errors import Unsupported
from luthier_gateway.openai.chat_template import ChatTemplate, Message

CONTEXT_TOKENS = 5
"""Tokens of a prompt's end that are decoded with what follows: enough to hold some text."""


class ModelText:
    """Text of one base model, in and out."""

    def __init__(
        self, tokenizer: Tokenizer, eos: frozenset[int], templates: Mapping[str, ChatTemplate]
    ) -> None:
        self._tokenizer = tokenizer
        self.eos = eos
        """Tokens that end a sequence, as the sampler has them."""
        self._templates = templates

    @classmethod
    def load(cls, files: Mapping[str, str]) -> Self:
        """`files`: name in the model's folder -> text. Unsupported without a tokenizer.json."""
        if "tokenizer.json" not in files:
            raise Unsupported("model: it has no tokenizer.json, so it is served by token ids only")
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _read_json(files, "tokenizer_config.json")
        special_tokens = _special_tokens(settings)
        templates = {
            name: ChatTemplate(source, special_tokens)
            for name, source in _template_sources(files, settings).items()
        }
        return cls(tokenizer, _eos(files), templates)

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a plain prompt, with those that the tokenizer puts before every text."""
        return list(self._tokenizer.encode(prompt).ids)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> list[int]:
        """Tokens of a conversation as the chat template writes it."""
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise Unsupported(
                "messages: the model has no chat template; render the prompt and use /completions"
            )
        text = template.render(messages, tools=tools, variables=variables)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def name(self, token: int) -> str:
        """The text of one token alone, of a special one too."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def _read_json(files: Mapping[str, str], name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(files.get(name, "{}"))
    return value


def _eos(files: Mapping[str, str]) -> frozenset[int]:
    """As luthier_model.base finds them: generation_config names every token that ends a turn."""
    found = _read_json(files, "generation_config.json").get("eos_token_id")
    if found is None:
        config = _read_json(files, "config.json")
        found = config.get("text_config", config).get("eos_token_id")
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on: strings, or objects with their text."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


def _template_sources(files: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """name -> source; most models have one, called default."""
    if "chat_template.jinja" in files:
        return {"default": files["chat_template.jinja"]}
    found = settings.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    return {item["name"]: item["template"] for item in found or ()}
