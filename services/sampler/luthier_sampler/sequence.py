"""What one sampling request asks for, and the state of each of its sequences."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from luthier_core.prompt_targets import PromptTargets
from luthier_model.lora import LoraAdapter
from luthier_sampler.scores import PromptScores, TopkTable


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sampling request; sample i of a seeded request draws with seed + i.

    A sequence stops at the model's EOS, at any of stop_tokens and at any of stop_strings, and the
    stop is part of the returned tokens. On the wire an absent `stop` is both lists empty, a list of
    strings or ids comes on top of EOS, and `[]` is ignore_eos: then nothing stops but the length.
    """

    request_id: str
    prompt: Seq[int] | NDArray[np.int32]
    num_samples: int = 1
    max_tokens: int | None = None
    """Generated tokens; None, or more than fits, is up to the context limit."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = -1
    """-1 and 0 are off."""
    top_p: float = 1.0
    seed: int | None = None
    """With a seed, the same request gives the same tokens whatever else runs."""
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    """Score only the last n prompt tokens; None is all but the first."""
    target_prompt_logprobs: PromptTargets | None = None
    prompt_alt_tokens_k: int = 0
    """Draws per prompt position, with replacement, at `temperature`."""
    topk_sample_logprobs: int = 0
    adapter: str = ""
    """Key of a loaded adapter; empty is the base model."""
    follows: str = ""
    """In-flight weights that it moves on with (Engine.move), from `adapter` on; empty: none."""
    cache_scope: str | None = None
    """Requests of one scope (a tenant) and adapter share prompt blocks; None: with no other."""
    streams: bool = False
    """Its tokens are told while it runs."""


class Request:
    """A SampleRequest that runs: its sequences, and what its prompt scored."""

    def __init__(
        self,
        spec: SampleRequest,
        *,
        arrival: int,
        seed: int,
        max_new_tokens: int,
        adapter: LoraAdapter | None,
        stop_tokens: frozenset[int],
    ) -> None:
        self.spec = spec
        self.arrival = arrival
        self.max_new_tokens = max_new_tokens
        self.adapter = adapter
        self.adapter_key = spec.adapter
        """Of the adapter that it runs with now."""
        self.stop_tokens = stop_tokens
        self.prompt: list[int] = np.asarray(spec.prompt, dtype=np.int64).tolist()
        self.scores = PromptScores(spec, seed)
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the cache when its first sequence was admitted."""
        self.sequences = [Sequence(self, i, seed + i) for i in range(spec.num_samples)]

    @property
    def is_finished(self) -> bool:
        return all(sequence.stop_reason for sequence in self.sequences)

    @property
    def cache_root(self) -> bytes:
        """Where its chain of block keys begins: other scopes and weights have other keys."""
        spec = self.spec
        shared = spec.cache_scope is not None
        scope = f"scope:{spec.cache_scope}" if shared else f"request:{spec.request_id}"
        return blake2b(f"{len(scope)}:{scope}{spec.adapter}".encode(), digest_size=16).digest()


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample: its tokens, how many are in the KV cache, and where."""

    request: Request = field(repr=False)
    index: int
    seed: int
    tokens: list[int] = field(init=False)
    """Prompt and generated tokens; the last is generated but not yet in the cache."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    block_table: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[TopkTable] = field(default_factory=list)
    """One row per generated token, if the request wants topk_sample_logprobs."""
    stop_reason: str = ""
    """stop | length; empty while it runs."""
    num_told: int = 0
    """Generated tokens that partials() has told."""
    _block_keys: list[bytes] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def order(self) -> tuple[int, int]:
        """Position in the line: by arrival, then by sample."""
        return (self.request.arrival, self.index)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def computes_scores(self) -> bool:
        """It has yet to compute what its request wants to know of the prompt."""
        return self.index == 0 and self.num_new_tokens == 0

    @property
    def num_sharable(self) -> int:
        """Its first tokens whose keys and values are all that is needed of them."""
        # The last token is computed in any case: its row predicts the next one.
        num_tokens = len(self.tokens) - 1
        if self.computes_scores and self.request.scores.first is not None:
            return min(num_tokens, self.request.scores.first - 1)
        return num_tokens

    def block_keys(self, num_blocks: int, block_tokens: int) -> list[bytes]:
        """Keys of its first full blocks; each covers everything before it, so equal keys mean equal
        prefixes."""
        while len(self._block_keys) < num_blocks:
            start = len(self._block_keys) * block_tokens
            before = self._block_keys[-1] if start else self.request.cache_root
            block = np.asarray(self.tokens[start : start + block_tokens], np.int32)
            key = blake2b(before + block.tobytes(), digest_size=16).digest()
            self._block_keys.append(key)
        return self._block_keys[:num_blocks]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens [start, stop) of a sequence that one step computes."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def samples(self) -> bool:
        """It reaches the sequence's last token, so its last row predicts the next one."""
        return self.stop == len(self.sequence.tokens)
