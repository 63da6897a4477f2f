"""Helpers for training data: datums from tokens or chat messages, batches, and what they cost."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier import types

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, as the tokenizer's chat template reads it."""
TrainOn = Literal["last_assistant", "all_assistants", "all"]


def datum_from_tokens(tokens: Sequence[int], weights: Sequence[float] | None = None) -> types.Datum:
    """A datum for next-token prediction over N tokens: N - 1 positions, shifted here.

    weights[i] is the weight of predicting tokens[i]; the first has no position. None: all 1.
    ValueError if there are fewer than two tokens, or not one weight per token.
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens: {len(tokens)} of them; predicting the next one needs two")
    if weights is not None and len(weights) != len(tokens):
        raise ValueError(f"weights: {len(weights)} for {len(tokens)} tokens")
    kept = [1.0] * (len(tokens) - 1) if weights is None else list(weights[1:])
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": list(tokens[1:]), "weights": kept},
    )


def datum_from_completion(prompt: Sequence[int], completion: Sequence[int]) -> types.Datum:
    """A datum that learns the completion's tokens after the prompt's, and not the prompt's."""
    weights = [0.0] * len(prompt) + [1.0] * len(completion)
    return datum_from_tokens([*prompt, *completion], weights)


def datum_from_messages(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    train_on: TrainOn = "last_assistant",
    max_length: int | None = None,
) -> types.Datum:
    """A datum from a chat, written by the tokenizer's own template.

    An assistant's turn is what the template adds to the chat before it once that ends with the
    generation prompt. max_length: longest in tokens; the end is cut off. ValueError if the template
    writes earlier turns anew when later ones come (some drop their reasoning): then the turns have
    no tokens of their own, so train on "last_assistant", or "all".
    """
    tokens = _templated(messages, tokenizer)
    if train_on == "all":
        weights = [1.0] * len(tokens)
    else:
        weights = [0.0] * len(tokens)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise ValueError("messages: none of them is of the role assistant")
        for turn in turns if train_on == "all_assistants" else turns[-1:]:
            start = _length_of_prefix(messages[:turn], tokens, tokenizer, generation_prompt=True)
            end = _length_of_prefix(messages[: turn + 1], tokens, tokenizer)
            weights[start:end] = [1.0] * (end - start)
    if max_length is not None:
        tokens, weights = tokens[: max_length + 1], weights[: max_length + 1]
    return datum_from_tokens(tokens, weights)


def _length_of_prefix(
    messages: Sequence[Message],
    tokens: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    generation_prompt: bool = False,
) -> int:
    prefix = _templated(messages, tokenizer, generation_prompt=generation_prompt)
    if list(tokens[: len(prefix)]) != prefix:
        raise ValueError(
            f"messages: the template writes the first {len(messages)} turns differently when more "
            "follow, so the tokens of a turn cannot be told apart"
        )
    return len(prefix)


def _templated(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    generation_prompt: bool = False,
) -> list[int]:
    if not messages:
        return []
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=generation_prompt,
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def batches(
    data: Iterable[types.Datum], *, max_tokens: int, max_datums: int | None = None
) -> Iterator[list[types.Datum]]:
    """Batches in the order of the data, each of at most max_tokens positions in all.

    A datum that is longer by itself is a batch of its own. ValueError if a limit is below 1.
    """
    if max_tokens < 1 or (max_datums is not None and max_datums < 1):
        raise ValueError(f"max_tokens={max_tokens}, max_datums={max_datums}: must be 1 or more")
    batch: list[types.Datum] = []
    num_tokens = 0
    for datum in data:
        length = datum.model_input.length
        full = num_tokens + length > max_tokens or len(batch) == max_datums
        if batch and full:
            yield batch
            batch, num_tokens = [], 0
        batch.append(datum)
        num_tokens += length
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Estimate:
    """What training on some data takes, before anything is sent."""

    num_datums: int
    num_tokens: int
    """Positions in one epoch: what a server counts as trained tokens."""
    num_weighted_tokens: int
    """Those of them that have a weight, so a loss."""
    longest_tokens: int
    num_steps: int
    """Optimizer steps in all epochs."""
    total_tokens: int
    """Trained tokens in all epochs."""
    cost: float | None
    """In the currency of the price; None without one."""


def estimate(
    data: Sequence[types.Datum],
    *,
    batch_tokens: int,
    num_epochs: int = 1,
    price_per_million_tokens: float | None = None,
) -> Estimate:
    """A dry run: tokens, steps and cost of num_epochs over the data in batches of batch_tokens."""
    lengths = [datum.model_input.length for datum in data]
    total = sum(lengths) * num_epochs
    price = price_per_million_tokens
    return Estimate(
        num_datums=len(data),
        num_tokens=sum(lengths),
        num_weighted_tokens=sum(_num_weighted(datum) for datum in data),
        longest_tokens=max(lengths, default=0),
        num_steps=sum(1 for _ in batches(data, max_tokens=batch_tokens)) * num_epochs,
        total_tokens=total,
        cost=None if price is None else total / 1e6 * price,
    )


def _num_weighted(datum: types.Datum) -> int:
    weights = datum.loss_fn_inputs.get("weights")
    if weights is None:
        return datum.model_input.length
    return int((weights.to_numpy() != 0).sum())
