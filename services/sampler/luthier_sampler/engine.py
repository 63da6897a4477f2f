"""Engine: continuous batching for one base model. step(): schedule, run, sample, finish.

One thread calls it. What crosses is bytes and dataclasses, no tensors (design 7).
"""

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier_core.config import SamplerConfig
from luthier_core.errors import BadRequest, Category, ConfigError, LuthierError
from luthier_model.base import BaseModel
from luthier_model.paged import KvCache, block_bytes
from luthier_model.peft_io import adapter_from_files
from luthier_sampler.adapters import AdapterCache
from luthier_sampler.admission import Limits, check
from luthier_sampler.kv_cache import BlockManager
from luthier_sampler.partials import new_tokens
from luthier_sampler.response import response_bytes
from luthier_sampler.runner import Runner
from luthier_sampler.sampling import Tokenizer, sample, stop_reason, uniform
from luthier_sampler.scheduler import Scheduler
from luthier_sampler.scores import most_likely
from luthier_sampler.sequence import Chunk, Request, SampleRequest
from luthier_sampler.sequence import Sequence as SampledSequence

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one request: a protobuf SampleResponse, or an error and whose fault it is."""

    request_id: str
    response: bytes | None
    error: str | None = None
    category: Category = "server"
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_sampled_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges, then counters since the start."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_adapters: int
    num_steps: int
    num_preemptions: int
    num_computed_tokens: int
    num_sampled_tokens: int


class Engine:
    """Requests in, finished requests out; everything between is decided step by step."""

    def __init__(self, model: BaseModel, tokenizer: Tokenizer, config: SamplerConfig) -> None:
        """ConfigError if the KV cache holds no block, or a step no token for each sequence."""
        if config.max_running > config.max_step_tokens:
            raise ConfigError("sampler.max_step_tokens: must be at least sampler.max_running")
        num_blocks = _num_blocks(model, config)
        cache = KvCache(
            model.facts,
            num_blocks=num_blocks,
            block_tokens=config.kv_block_tokens,
            dtype=model.dtype,
            device=model.device,
        )
        self.model = model
        self.limits = Limits(
            vocab_size=model.facts.vocab_size,
            max_context_tokens=model.facts.max_context_tokens,
            num_cache_tokens=num_blocks * config.kv_block_tokens,
        )
        self._tokenizer = tokenizer
        self._tempered = config.sample_logprobs == "tempered"
        self._blocks = BlockManager(num_blocks, config.kv_block_tokens)
        self._scheduler = Scheduler(
            self._blocks, max_running=config.max_running, max_step_tokens=config.max_step_tokens
        )
        self._runner = Runner(model, cache)
        self._adapters = AdapterCache(
            config.max_adapters, host_bytes=config.host_adapter_bytes, device=model.device
        )
        self._requests: dict[str, Request] = {}
        self._num_arrivals = self._num_steps = 0
        self._num_computed_tokens = self._num_sampled_tokens = 0

    def has_adapter(self, key: str) -> bool:
        return key in self._adapters

    def add_adapter(self, key: str, files: Mapping[str, bytes]) -> None:
        """Load PEFT files under `key`; add() the request that needs them before the next adapter.

        BadRequest says what in the files does not fit the model.
        """
        adapter = adapter_from_files(files, self.model.lora_shapes, self.model.device)
        self._adapters.put(key, adapter)

    def add(self, spec: SampleRequest) -> None:
        """Queue a request; a request_id that is already here is not run twice.

        BadRequest if it could never run: step() answers every request that add() takes.
        """
        if spec.request_id in self._requests:
            return
        check(spec, self.limits)
        if spec.adapter and spec.adapter not in self._adapters:
            raise BadRequest(f"adapter={spec.adapter!r} is not loaded")
        stops = () if spec.ignore_eos else self.model.facts.eos_token_ids
        request = Request(
            spec,
            arrival=self._num_arrivals,
            seed=secrets.randbits(64) if spec.seed is None else spec.seed,
            max_new_tokens=self.limits.max_new_tokens(spec),
            adapter=self._adapters.acquire(spec.adapter) if spec.adapter else None,
            stop_tokens=frozenset((*spec.stop_tokens, *stops)),
        )
        self._num_arrivals += 1
        self._requests[spec.request_id] = request
        # The other samples join when the prompt is in the cache, and share it.
        self._scheduler.add(request.sequences[0])

    def move(self, target: str, adapter: str) -> None:
        """What follows `target` runs on with this loaded adapter, from its next token on.

        Keys and values in the cache stay. Prompt blocks that are shared cannot get stale by it: a
        request that comes later has the key of the new adapter.
        """
        for request in self._requests.values():
            if request.spec.follows == target and request.adapter_key != adapter:
                moved = self._adapters.acquire(adapter)
                self._adapters.release(request.adapter_key)
                request.adapter, request.adapter_key = moved, adapter

    def cancel(self, request_id: str) -> None:
        """Drop a request and free its blocks; nothing is reported of it. Fine if it is not here."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        for sequence in request.sequences:
            self._scheduler.remove(sequence)
        if request.adapter is not None:
            self._adapters.release(request.adapter_key)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_free_slots(self) -> int:
        """How many more requests are worth claiming: sequences that could run beside those here."""
        num_unfinished = sum(
            not sequence.stop_reason
            for request in self._requests.values()
            for sequence in request.sequences
        )
        return max(0, self._scheduler.max_running - num_unfinished)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free,
            num_adapters=len(self._adapters),
            num_steps=self._num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_computed_tokens=self._num_computed_tokens,
            num_sampled_tokens=self._num_sampled_tokens,
        )

    def step(self) -> list[Finished]:
        """Compute one batch of decodes and prefill chunks; the requests that this finishes.

        An error fails the requests of this batch only.
        """
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        self._num_steps += 1
        try:
            with torch.inference_mode():
                diverged = self._advance(chunks)
        except Exception as error:
            requests = dict.fromkeys(chunk.sequence.request for chunk in chunks)
            log.exception("a step failed, and %d requests with it", len(requests))
            return [self._fail(request, error) for request in requests]
        failed = [self._fail(r, _not_finite(r)) for r in dict.fromkeys(diverged)]
        return failed + self._collect()

    def partials(self) -> dict[str, str]:
        """request_id -> message of the tokens that are new since the last call; who streams."""
        streaming = (request for request in self._requests.values() if request.spec.streams)
        messages = ((request.spec.request_id, new_tokens(request)) for request in streaming)
        return {request_id: message for request_id, message in messages if message}

    def _advance(self, chunks: Sequence[Chunk]) -> list[Request]:
        """Run the model and give the next token to each sequence whose tokens are all computed.

        Returns the requests whose logits are not finite numbers.
        """
        logits_BV = self._runner.run(chunks)
        self._scheduler.commit(chunks)
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        sequences, logits_BV = self._join_siblings(sequences, logits_BV)
        self._num_computed_tokens += sum(chunk.num_tokens for chunk in chunks)
        if not sequences:
            return []
        specs = [sequence.request.spec for sequence in sequences]
        uniforms = [uniform(sequence.seed, sequence.num_new_tokens) for sequence in sequences]
        tokens_B, logprobs_BV = sample(logits_BV, specs, uniforms, tempered=self._tempered)
        logprobs_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        for sequence, row_V in zip(sequences, logprobs_BV, strict=True):
            if k := sequence.request.spec.topk_sample_logprobs:
                sequence.topk.append(most_likely(row_V[None], k))
        for sequence, token, logprob in zip(
            sequences, tokens_B.tolist(), logprobs_B.tolist(), strict=True
        ):
            self._append(sequence, token, logprob)
        # One number that is not finite makes every logprob of its row NaN.
        finite_B = logprobs_B.isfinite().tolist()
        return [s.request for s, finite in zip(sequences, finite_B, strict=True) if not finite]

    def _join_siblings(
        self, sequences: list[SampledSequence], logits_BV: Tensor
    ) -> tuple[list[SampledSequence], Tensor]:
        """With the other samples of prompts that are now computed: they share logits and blocks.

        Those that find no room wait, and find most of the prompt in the cache.
        """
        joined, rows = list(sequences), list(range(len(sequences)))
        copies: list[tuple[int, int]] = []
        for row, sequence in enumerate(sequences):
            if sequence.index or sequence.num_new_tokens:
                continue
            for sibling in sequence.request.sequences[1:]:
                forked = self._scheduler.fork(sequence, sibling)
                if forked is None:
                    self._scheduler.add(sibling)
                    continue
                copies += forked
                joined.append(sibling)
                rows.append(row)
        if len(joined) == len(sequences):
            return sequences, logits_BV
        self._runner.copy_blocks(copies)
        return joined, logits_BV[torch.tensor(rows, device=logits_BV.device)]

    def _append(self, sequence: SampledSequence, token: int, logprob: float) -> None:
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        sequence.stop_reason = stop_reason(sequence, self._tokenizer)
        self._num_sampled_tokens += 1

    def _collect(self) -> list[Finished]:
        """Let go of the sequences that ended, and answer the requests whose last one this was."""
        ended = [sequence for sequence in self._scheduler.running if sequence.stop_reason]
        for sequence in ended:
            self._scheduler.remove(sequence)
        finished = []
        for request in dict.fromkeys(sequence.request for sequence in ended):
            request_id = request.spec.request_id
            if request.is_finished and request_id in self._requests:
                self.cancel(request_id)
                finished.append(
                    Finished(
                        request_id,
                        response_bytes(request),
                        num_prompt_tokens=len(request.spec.prompt),
                        num_cached_tokens=request.num_cached_tokens or 0,
                        num_sampled_tokens=sum(len(s.new_tokens) for s in request.sequences),
                    )
                )
        return finished

    def _fail(self, request: Request, error: Exception) -> Finished:
        self.cancel(request.spec.request_id)
        if isinstance(error, LuthierError):
            return Finished(request.spec.request_id, None, error.message, error.category)
        return Finished(request.spec.request_id, None, f"the sampler failed: {error!r}")


def _not_finite(request: Request) -> BadRequest:
    weights = f"adapter {request.adapter_key!r}" if request.adapter_key else "the base model"
    return BadRequest(f"{weights} gives logits that are not finite numbers: have they diverged?")


def _num_blocks(model: BaseModel, config: SamplerConfig) -> int:
    if config.num_kv_blocks:
        return config.num_kv_blocks
    one = block_bytes(model.facts, config.kv_block_tokens, model.dtype)
    if config.kv_cache_bytes < one:
        raise ConfigError(
            f"sampler.kv_cache_bytes: must be at least {one}, one block of this model"
        )
    return config.kv_cache_bytes // one
