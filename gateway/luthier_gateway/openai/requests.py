"""Requests of the OpenAI API: what is taken, and what is known but refused.

Unknown fields pass. A known field that this server cannot honour is refused where it has another
value than its default, so nobody gets an answer other than the one asked for.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import ConfigDict, Field, field_validator

from luthier_core.errors import InvalidField, Unsupported
from luthier_core.types import ModelInput, Sample, SamplingParams, TextChunk, WireModel, check
from luthier_core.validation import ModelLimits, check_sample
from luthier_gateway.openai.answers import ChatAnswers, CompletionAnswers
from luthier_gateway.openai.model_text import ModelText

MAX_PROMPTS = 128
MAX_STOPS = 64
DEFAULT_MAX_TOKENS = 16
"""Of a completion; a chat goes on to the end of the context."""

Refused = Mapping[str, tuple[tuple[Any, ...], str]]
"""Field -> (values that ask for nothing, what to do instead)."""

_REFUSED: Refused = {
    "presence_penalty": ((0,), "not supported; leave it out"),
    "frequency_penalty": ((0,), "not supported; leave it out"),
    "logit_bias": (({},), "not supported; leave it out"),
}
_REFUSED_IN_COMPLETIONS: Refused = {
    **_REFUSED,
    "suffix": (("",), "text is generated at the end only"),
}
_REFUSED_IN_CHATS: Refused = {
    **_REFUSED,
    "response_format": (
        ({"type": "text"},),
        "generation is not constrained to JSON; ask for it in a message and check what comes",
    ),
    "tool_choice": (("auto", "none"), "only auto and none: no tool can be forced"),
    "functions": (([],), "use tools"),
    "function_call": (("auto", "none"), "use tools"),
    "modalities": ((["text"],), "text only"),
    "audio": ((), "text only"),
    "prediction": ((), "not supported; leave it out"),
    "reasoning_effort": ((), "send what the chat template knows in chat_template_kwargs"),
    "verbosity": ((), "send what the chat template knows in chat_template_kwargs"),
    "web_search_options": ((), "this server searches nothing"),
    "moderation": ((), "this server moderates nothing"),
    "store": ((False,), "answers are not kept"),
    "service_tier": (("auto", "default"), "there is one tier"),
}


def _refuse(value: Mapping[str, Any], refused: Refused) -> None:
    for name, (harmless, reason) in refused.items():
        asked = value.get(name)
        if asked is not None and asked not in harmless:
            raise Unsupported(f"{name}: {reason}")


class StreamOptions(WireModel):
    include_usage: bool = False


class _Request(WireModel):
    """What both kinds share. Sampling parameters have the sampler's ranges."""

    _prompt_field: ClassVar[str]

    model: str
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    """Not OpenAI's, but of other servers that speak this API."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def samples(self, prompts: Sequence[list[int]], limits: ModelLimits) -> list[Sample]:
        """One request to the sampler per prompt; InvalidField names what does not fit the model."""
        if self.n > limits.max_num_samples:
            raise InvalidField(f"n: {self.n}; at most {limits.max_num_samples}")
        return [self._sample(prompt, limits) for prompt in prompts]

    def _sample(self, prompt: list[int], limits: ModelLimits) -> Sample:
        params = SamplingParams(
            max_tokens=self._most_tokens(len(prompt), limits.max_context_tokens),
            # A stream's sample may be started again, and must then go on as it began.
            seed=secrets.randbits(63) if self.seed is None and self.stream else self.seed,
            # An empty list is the absence of stops here, and of EOS for the sampler.
            stop=list(self.stops) or None,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        sample = Sample(
            # The operation log knows both; the sampler reads neither.
            sampling_session_id="",
            seq_id=0,
            prompt=ModelInput(chunks=[TextChunk(tokens=prompt)]),
            num_samples=self.n,
            sampling_params=params,
            **self._scores(),
        )
        check_sample(sample, limits)
        return sample

    def _most_tokens(self, num_prompt_tokens: int, context: int) -> int | None:
        """max_tokens for the sampler; InvalidField if they do not fit beside the prompt."""
        room = context + 1 - num_prompt_tokens  # the last token need not be in the context
        if room < 1:
            raise InvalidField(
                f"{self._prompt_field}: {num_prompt_tokens} tokens; the model's context has "
                f"{context}"
            )
        field, wanted = self._wanted_tokens()
        if wanted is None:
            return None
        if field not in self.model_fields_set:
            return min(wanted, room)
        if wanted > room:
            raise InvalidField(
                f"{field}: {wanted} after {num_prompt_tokens} tokens of {self._prompt_field}; the "
                f"model's context has {context}, so at most {room}"
            )
        return max(1, wanted)

    def _wanted_tokens(self) -> tuple[str, int | None]:
        """The field that says how many tokens may be generated, and its value."""
        raise NotImplementedError

    def _scores(self) -> dict[str, Any]:
        """Fields of Sample that ask for logprobs."""
        raise NotImplementedError

    @field_validator("stop")
    @classmethod
    def _stops_have_text(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and "" in (value if isinstance(value, list) else [value]):
            raise ValueError("a stop string must not be empty")
        return value


class CompletionRequest(_Request):
    """POST completions."""

    _prompt_field: ClassVar[str] = "prompt"

    prompt: list[str | list[int]]
    """Texts or token ids."""
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0)
    """0 with echo only: nothing but the prompt is wanted."""
    logprobs: int | None = Field(None, ge=0, le=100)
    echo: bool = False
    best_of: int | None = None

    @classmethod
    def of(cls, value: dict[str, Any]) -> Self:
        """InvalidField or Unsupported, naming the field, for what cannot be done."""
        _refuse(value, _REFUSED_IN_COMPLETIONS)
        wanted = check(cls, value)
        if wanted.max_tokens == 0 and not wanted.echo:
            raise InvalidField("max_tokens: 0 needs echo, or nothing is wanted")
        if wanted.best_of not in (None, wanted.n):
            raise Unsupported("best_of: must be n; choose among n yourself")
        if wanted.echo and wanted.stream and wanted.logprobs is not None:
            raise Unsupported("echo: with logprobs it is not streamed")
        return wanted

    def prompts(self, text: ModelText) -> list[list[int]]:
        """Token ids of each prompt."""
        return [text.encode(p) if isinstance(p, str) else p for p in self.prompt]

    def answers(self, request_id: str, text: ModelText) -> CompletionAnswers:
        return CompletionAnswers(request_id, self.model, text, self.logprobs)

    def _wanted_tokens(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens

    def _scores(self) -> dict[str, Any]:
        scores: dict[str, Any] = {"topk_sample_logprobs": self.logprobs or 0}
        if self.echo and self.logprobs is not None:
            scores |= {"prompt_logprobs": True, "topk_prompt_logprobs": self.logprobs}
        return scores

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        """One text, tokens of one text, or a list of either."""
        if isinstance(value, str) or (isinstance(value, list) and value and _is_int(value[0])):
            value = [value]
        if not isinstance(value, list) or not value or len(value) > MAX_PROMPTS:
            raise ValueError(f"must be a text, a list of token ids, or 1 to {MAX_PROMPTS} of these")
        if not all(
            isinstance(p, str) or (isinstance(p, list) and all(map(_is_int, p))) for p in value
        ):
            raise ValueError("each prompt must be a text or a list of token ids")
        return value


class ToolFunction(WireModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    name: str


class Tool(WireModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    type: Literal["function"]
    function: ToolFunction


class ContentPart(WireModel):
    type: Literal["text"]
    text: str


class ToolCallFunction(WireModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    """JSON in a string on the wire; chat templates want the object."""

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_object(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return orjson.loads(value or "{}")
        except orjson.JSONDecodeError as error:
            raise ValueError(f"no JSON: {error}") from None


class ToolCall(WireModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    type: Literal["function"] = "function"
    function: ToolCallFunction


class ChatMessage(WireModel):
    """A message; fields that only the chat template knows are kept for it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: list[ToolCall] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Parts are joined. Only text has a place in a prompt."""
        if not isinstance(value, list):
            return value
        for part in value:
            if isinstance(part, dict) and part.get("type") != "text":
                raise ValueError(f"a part of type {str(part.get('type'))[:40]!r}; text only")
        return "".join(ContentPart.model_validate(part).text for part in value)


class ChatRequest(_Request):
    """POST chat/completions."""

    _prompt_field: ClassVar[str] = "messages"

    messages: list[ChatMessage] = Field(min_length=1)
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking. Not OpenAI's either."""

    @classmethod
    def of(cls, value: dict[str, Any]) -> Self:
        """InvalidField or Unsupported, naming the field, for what cannot be done."""
        _refuse(value, _REFUSED_IN_CHATS)
        wanted = check(cls, value)
        if wanted.top_logprobs and not wanted.logprobs:
            raise InvalidField("top_logprobs: needs logprobs, which is false")
        return wanted

    def prompts(self, text: ModelText) -> list[list[int]]:
        """Token ids of the one conversation; tools are left out if none may be called."""
        tools = () if self.tool_choice == "none" else self.tools
        return [
            text.encode_chat(
                [message.model_dump(exclude_none=True) for message in self.messages],
                [tool.model_dump(exclude_none=True) for tool in tools],
                self.chat_template_kwargs,
            )
        ]

    def answers(self, request_id: str, text: ModelText) -> ChatAnswers:
        top_logprobs = self.top_logprobs if self.logprobs else None
        return ChatAnswers(request_id, self.model, text, top_logprobs)

    def _wanted_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def _scores(self) -> dict[str, Any]:
        return {"topk_sample_logprobs": self.top_logprobs}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
