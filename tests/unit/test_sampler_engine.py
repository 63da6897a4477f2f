"""The sampler engine on a tiny random model: what it promises about requests that share steps."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_qwen3 import TWO_LAYERS, save_tiny_qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier_core.config import SamplerConfig
from luthier_core.errors import BadRequest, ConfigError
from luthier_core.prompt_targets import PromptTargets
from luthier_core.proto import wire_pb2
from luthier_model.base import BaseModel, load_base_model
from luthier_model.lora import LoraSpec, init_adapter
from luthier_model.peft_io import adapter_files
from luthier_sampler.engine import Engine, Finished
from luthier_sampler.sequence import SampleRequest

EOS = 257
VOCAB_SIZE = 260
MERGES = [("a", "b"), ("ab", "c")]
"""Tokens 258 and 259 are "ab" and "abc"; 0 to 255 are single bytes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    shape = {**TWO_LAYERS, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 96}
    save_tiny_qwen3(folder, seed=3, eos_token_id=EOS, **shape)
    return load_base_model("tiny", folder)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose id of a byte is the byte."""
    letters = _byte_letters()
    vocab = {letter: byte for byte, letter in letters.items()}
    vocab |= {"<pad>": 256, "<eos>": EOS, "ab": 258, "abc": 259}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


@pytest.fixture
def make_engine(model: BaseModel, tokenizer: Any) -> Callable[..., Engine]:
    def make(**settings: Any) -> Engine:
        return Engine(model, tokenizer, SamplerConfig(**{"num_kv_blocks": 64, **settings}))

    return make


def request(request_id: str = "r", **fields: Any) -> SampleRequest:
    return SampleRequest(**{"request_id": request_id, "prompt": (5, 6, 7), "seed": 1, **fields})


def drain(engine: Engine) -> list[Finished]:
    finished = []
    while engine.has_work:
        finished += engine.step()
    return finished


def answer(finished: Finished) -> wire_pb2.SampleResponse:
    assert finished.response is not None, finished.error
    return wire_pb2.SampleResponse.FromString(finished.response)


def run(engine: Engine, specs: Iterable[SampleRequest]) -> dict[str, wire_pb2.SampleResponse]:
    for spec in specs:
        engine.add(spec)
    return {finished.request_id: answer(finished) for finished in drain(engine)}


def tokens_of(sequence: wire_pb2.SampledSequence) -> list[int]:
    return np.frombuffer(sequence.tokens, "<i4").tolist()


def sampled(engine: Engine, spec: SampleRequest) -> list[int]:
    """Tokens of the request's only sequence."""
    return tokens_of(run(engine, [spec])[spec.request_id].sequences[0])


def script(engine: Engine, monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """From now on the model's likeliest next token after position p is tokens[p - 2]."""

    def logits(chunks: Any) -> torch.Tensor:
        rows = [c.sequence.num_new_tokens for c in chunks if c.samples]
        return (
            torch.nn.functional.one_hot(torch.tensor([tokens[i] for i in rows]), VOCAB_SIZE) * 9.0
        )

    run_model = engine._runner.run
    monkeypatch.setattr(
        engine._runner, "run", lambda chunks: (run_model(chunks), logits(chunks))[1]
    )


def rows_are_independent() -> bool:
    """Whether, on this CPU, a row of a matrix product is the same in products of different size."""
    x, y = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3))
    return all(torch.equal((x[:rows] @ y)[0], (x @ y)[0]) for rows in range(4, 64))


LONG = request("long", max_tokens=40, ignore_eos=True)
SHORT = request("short", max_tokens=3, ignore_eos=True, prompt=(9, 8), seed=2)


def test_a_late_short_request_finishes_before_an_early_long_one(make_engine):
    engine = make_engine()
    engine.add(LONG)
    for _ in range(5):
        assert engine.step() == []
    engine.add(SHORT)
    assert [finished.request_id for finished in drain(engine)] == ["short", "long"]
    assert engine.stats.num_steps == 40


def test_a_batch_gives_each_request_what_it_gets_alone(make_engine):
    random = np.random.default_rng(0)
    specs = [
        request(
            f"r{i}",
            prompt=random.integers(0, VOCAB_SIZE, length).astype(np.int32),
            seed=i,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_tokens=12,
            ignore_eos=True,
            prompt_logprobs=True,
            topk_sample_logprobs=2,
        )
        for i, (length, temperature, top_k, top_p) in enumerate(
            [
                (1, 1.0, -1, 1.0),
                (50, 0.0, -1, 1.0),
                (17, 0.7, 5, 1.0),
                (16, 1.3, -1, 0.8),
                (3, 2.0, 9, 0.5),
            ]
        )
    ]
    together = run(make_engine(max_step_tokens=24, max_running=4), specs)
    deviation = 0.0
    for spec in specs:
        alone = run(make_engine(), [spec])[spec.request_id]
        batched = together[spec.request_id]
        assert tokens_of(batched.sequences[0]) == tokens_of(alone.sequences[0])
        for one, other in (
            (batched.sequences[0].logprobs, alone.sequences[0].logprobs),
            (batched.prompt_logprobs, alone.prompt_logprobs),
        ):
            one, other = np.frombuffer(one, "<f4"), np.frombuffer(other, "<f4")
            deviation = max(deviation, np.nanmax(np.abs(one - other), initial=0.0))
    print(f"batched and alone: logprobs differ by at most {deviation:.1e}")
    assert deviation == 0 if rows_are_independent() else deviation < 1e-6


def test_preempted_sequences_continue_with_the_same_tokens(make_engine):
    specs = [request(f"r{i}", seed=i, max_tokens=40, ignore_eos=True) for i in range(4)]
    roomy, tight = make_engine(), make_engine(num_kv_blocks=6)
    expected, got = run(roomy, specs), run(tight, specs)
    assert roomy.stats.num_preemptions == 0
    assert tight.stats.num_preemptions > 0
    for spec in specs:
        for one, other in zip(
            expected[spec.request_id].sequences, got[spec.request_id].sequences, strict=True
        ):
            assert tokens_of(one) == tokens_of(other)
    assert tight.stats.num_free_blocks == 6


def test_whatever_comes_and_goes_each_request_gets_its_own_tokens(make_engine):
    random = np.random.default_rng(8)
    specs = [
        request(
            f"r{i}",
            prompt=random.integers(0, VOCAB_SIZE, random.integers(1, 40)),
            num_samples=int(random.integers(1, 4)),
            max_tokens=int(random.integers(1, 30)),
            temperature=float(random.choice([0.0, 1.0])),
            seed=i,
            cache_scope="tenant",
        )
        for i in range(40)
    ]
    expected = run(make_engine(), specs)
    engine = make_engine(num_kv_blocks=8, max_running=6, max_step_tokens=16)
    got: dict[str, wire_pb2.SampleResponse] = {}
    for spec in specs:
        engine.add(spec)
        engine.add(replace(spec, request_id=f"{spec.request_id} is cancelled"))
        for _ in range(random.integers(0, 6)):
            got |= {finished.request_id: answer(finished) for finished in engine.step()}
        engine.cancel(f"{spec.request_id} is cancelled")
    got |= {finished.request_id: answer(finished) for finished in drain(engine)}
    for spec in specs:
        one, other = got[spec.request_id].sequences, expected[spec.request_id].sequences
        assert [tokens_of(s) for s in one] == [tokens_of(s) for s in other]
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_free_blocks == 8


def test_samples_of_one_request_differ_and_use_consecutive_seeds(make_engine):
    spec = request(num_samples=6, seed=10, max_tokens=8, prompt=tuple(range(40)), ignore_eos=True)
    response = run(make_engine(max_running=4), [spec])["r"]
    samples = [tokens_of(sequence) for sequence in response.sequences]
    alone = [sampled(make_engine(), replace(spec, num_samples=1, seed=10 + i)) for i in range(6)]
    assert samples == alone
    assert len({tuple(sample) for sample in samples}) == 6


def test_samples_of_one_request_share_its_full_prompt_blocks(make_engine):
    engine = make_engine(max_running=3)
    run(engine, [request(num_samples=4, prompt=tuple(range(40)), max_tokens=1)])
    # Three are sampled from the same row; the last waited for a place, shares two blocks of 16 and
    # computes what comes after them.
    assert engine.stats.num_computed_tokens == 40 + 8


def test_samples_write_to_blocks_of_their_own(make_engine):
    engine = make_engine()
    spec = request(num_samples=4, prompt=tuple(range(40)), max_tokens=20, ignore_eos=True)
    engine.add(spec)
    engine.step()
    # Two full blocks shared, and a copy of the third for each.
    assert engine.stats.num_free_blocks == 64 - 2 - 4
    response = {finished.request_id: answer(finished) for finished in drain(engine)}["r"]
    assert engine.stats.num_computed_tokens == 40 + 4 * 19
    for index, sequence in enumerate(response.sequences):
        alone = replace(spec, num_samples=1, seed=1 + index)
        assert tokens_of(sequence) == sampled(make_engine(), alone)
    assert engine.stats.num_free_blocks == 64


def test_prompt_blocks_are_shared_within_a_scope_only(make_engine):
    engine = make_engine()
    spec = request(prompt=tuple(range(40)), max_tokens=1)
    scopes = {"a": "tenant", "b": "tenant", "c": "other", "d": None, "e": None}
    hits = {}
    for request_id, scope in scopes.items():
        response = run(engine, [replace(spec, request_id=request_id, cache_scope=scope)])
        hits[request_id] = response[request_id].prompt_cache_hit_tokens
    assert hits == {"a": 0, "b": 32, "c": 0, "d": 0, "e": 0}


def test_prompt_blocks_are_not_shared_between_adapters(make_engine, model):
    engine = make_engine()
    engine.add_adapter("lora", adapter_of(model, 0, 0.05))
    spec = request(prompt=tuple(range(40)), max_tokens=1, cache_scope="tenant")
    run(engine, [spec])
    response = run(engine, [replace(spec, adapter="lora")])["r"]
    assert response.prompt_cache_hit_tokens == 0


def test_a_cached_prompt_gives_the_tokens_and_logprobs_of_one_that_is_computed(make_engine):
    engine = make_engine()
    spec = request("first", prompt=tuple(range(40)), max_tokens=9, cache_scope="t", ignore_eos=True)
    spec = replace(spec, prompt_logprobs=True, prompt_logprobs_last_n=5)
    first = run(engine, [spec])["first"]
    again = run(engine, [replace(spec, request_id="again")])["again"]
    # Scoring the last 5 needs the row of token 34, so 32 tokens come from the cache.
    assert (first.prompt_cache_hit_tokens, again.prompt_cache_hit_tokens) == (0, 32)
    assert tokens_of(first.sequences[0]) == tokens_of(again.sequences[0])
    for one, other in (
        (first.sequences[0].logprobs, again.sequences[0].logprobs),
        (first.prompt_logprobs, again.prompt_logprobs),
    ):
        one, other = np.frombuffer(one, "<f4"), np.frombuffer(other, "<f4")
        assert (np.isnan(one) == np.isnan(other)).all()
        tolerance = 0 if rows_are_independent() else 1e-6
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def test_only_the_part_of_a_prompt_that_is_scored_must_be_computed(make_engine):
    tokens = [-1, -1] * 30 + [5, 6] * 9
    tensor = {"data": tokens, "dtype": "int64", "shape": [39, 2]}
    targets = PromptTargets.parse(tensor, 40)
    spec = request(prompt=tuple(range(40)), max_tokens=1, cache_scope="tenant")
    engine = make_engine()
    run(engine, [spec])
    for wanted, num_hits in (
        ({"target_prompt_logprobs": targets}, 16),
        ({"prompt_alt_tokens_k": 1}, 0),
        ({"topk_prompt_logprobs": 2}, 0),
    ):
        response = run(engine, [replace(spec, **wanted)])["r"]
        assert response.prompt_cache_hit_tokens == num_hits


def test_alternatives_to_the_prompt_are_drawn_at_the_requests_temperature(make_engine):
    spec = request(prompt=tuple(range(40)), max_tokens=1, prompt_alt_tokens_k=4)

    def alternatives(**fields: Any) -> np.ndarray:
        engine = make_engine(max_step_tokens=fields.pop("max_step_tokens", 2048), max_running=8)
        drawn = run(engine, [replace(spec, **fields)])["r"].prompt_alt_tokens.tokens
        return np.frombuffer(drawn.dense, "<i8").reshape(39, 4)

    drawn = alternatives()
    assert len(np.unique(drawn)) > 60
    assert (alternatives(max_step_tokens=9) == drawn).all()
    assert (alternatives(seed=2) != drawn).mean() > 0.5
    greedy = alternatives(temperature=0.0)
    assert (greedy == greedy[:, :1]).all()
    assert (alternatives(temperature=0.01) == greedy).mean() > 0.9


def test_a_seed_decides_the_tokens(make_engine):
    spec = request(max_tokens=20, ignore_eos=True, seed=5)
    assert sampled(make_engine(), spec) == sampled(make_engine(), spec)
    assert sampled(make_engine(), spec) != sampled(make_engine(), replace(spec, seed=6))


def test_each_token_of_a_sequence_has_a_random_number_of_its_own(make_engine):
    # So hot that every token is equally likely, whatever the model says.
    spec = request(max_tokens=20, ignore_eos=True, temperature=1e6)
    assert len(set(sampled(make_engine(), spec))) > 10


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_tempered_logprobs_are_other_numbers_for_the_same_tokens(make_engine, temperature):
    spec = request(temperature=temperature, max_tokens=5, ignore_eos=True)
    raw, tempered = (
        run(make_engine(sample_logprobs=kind), [spec])["r"].sequences[0]
        for kind in ("raw", "tempered")
    )
    assert tokens_of(raw) == tokens_of(tempered)
    one, other = (np.frombuffer(s.logprobs, "<f4") for s in (raw, tempered))
    assert np.allclose(one, other) == (temperature != 0.5)


def test_without_a_seed_repetitions_differ(make_engine):
    engine = make_engine()
    spec = request(max_tokens=20, ignore_eos=True, seed=None)
    assert sampled(engine, spec) != sampled(engine, spec)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ({}, [97, EOS]),
        ({"stop_tokens": (99,)}, [97, EOS]),
        ({"stop_tokens": (97,)}, [97]),
        ({"ignore_eos": True}, [97, EOS, 98, 99, 100]),
        ({"ignore_eos": True, "stop_tokens": (99,)}, [97, EOS, 98, 99]),
    ],
    ids=["null", "ids and EOS", "ids", "empty list", "ids but not EOS"],
)
def test_stop_tokens_and_eos(make_engine, monkeypatch, stop, expected):
    engine = make_engine()
    script(engine, monkeypatch, [97, EOS, 98, 99, 100])
    sequence = run(engine, [request(temperature=0.0, max_tokens=5, **stop)])["r"].sequences[0]
    assert tokens_of(sequence) == expected
    stopped = len(expected) < 5
    assert sequence.stop_reason == (
        wire_pb2.STOP_REASON_STOP if stopped else wire_pb2.STOP_REASON_LENGTH
    )


@pytest.mark.parametrize(
    ("stop_string", "num_tokens"),
    [("cdx", 4), ("bcd", 3), ("é", 6), ("abcdx", 4), ("q", 8), ("<eos>", 7), ("dxé<", 7)],
)
def test_a_stop_string_ends_with_the_token_that_completes_it(
    make_engine, monkeypatch, stop_string, num_tokens
):
    engine = make_engine()
    # "abc", "z", "d": a token holds part of a stop string, several of it, or half a character.
    script(engine, monkeypatch, [258, 99, 100, 120, *"é".encode(), EOS, 120])
    spec = request(temperature=0.0, max_tokens=8, ignore_eos=True, stop_strings=(stop_string,))
    assert len(sampled(engine, spec)) == num_tokens


def test_a_stop_string_is_found_far_from_the_beginning(make_engine, monkeypatch):
    engine = make_engine()
    script(engine, monkeypatch, [120] * 50 + [*b"0123456789012345", 259, 258, 99, 120])
    spec = request(temperature=0.0, max_tokens=80, stop_strings=("x0123456789012345abcab",))
    assert len(sampled(engine, spec)) == 68


def test_a_stop_string_in_the_prompt_does_not_stop(make_engine, monkeypatch):
    engine = make_engine()
    script(engine, monkeypatch, [98, 97, 98, 99])
    spec = request(prompt=(97, 98, 97), temperature=0.0, max_tokens=4, stop_strings=("ab",))
    assert sampled(engine, spec) == [98, 97, 98]


def test_without_max_tokens_a_sequence_ends_at_the_context_limit(make_engine):
    sequence = run(make_engine(), [request(ignore_eos=True)])["r"].sequences[0]
    assert len(tokens_of(sequence)) == 96 - 3
    assert sequence.stop_reason == wire_pb2.STOP_REASON_LENGTH


def test_a_prompt_as_long_as_the_context_can_be_scored(make_engine):
    spec = request(prompt=(1,) * 96, max_tokens=1, prompt_logprobs=True)
    assert len(np.frombuffer(run(make_engine(), [spec])["r"].prompt_logprobs, "<f4")) == 96


def test_cancellation_frees_blocks_and_reports_nothing(make_engine):
    engine = make_engine(max_running=4)
    engine.add(SHORT)
    engine.add(replace(LONG, num_samples=9))
    for _ in range(2):
        engine.step()
    assert (engine.stats.num_running, engine.stats.num_free_blocks) == (4, 60)
    engine.cancel("long")
    assert engine.stats.num_free_blocks == 64 - 1
    assert [finished.request_id for finished in drain(engine)] == ["short"]
    assert engine.stats.num_free_blocks == 64
    engine.cancel("long")


def test_a_request_that_is_added_twice_runs_once(make_engine):
    engine = make_engine()
    engine.add(SHORT)
    engine.add(SHORT)
    assert [finished.request_id for finished in drain(engine)] == ["short"]


def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on(make_engine, monkeypatch):
    engine = make_engine()
    engine.add(LONG)
    engine.add(SHORT)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", lambda chunks: 1 / 0)
        failed = engine.step()
    assert {f.request_id for f in failed} == {"long", "short"}
    assert {f.category for f in failed} == {"server"}
    assert all("ZeroDivisionError" in (f.error or "") for f in failed)
    assert engine.stats.num_free_blocks == 64
    assert len(sampled(engine, SHORT)) == 3


def adapter_of(model: BaseModel, seed: int, spread: float) -> dict[str, bytes]:
    """PEFT files of a rank-4 adapter with a B that is not zero."""
    adapter = init_adapter(LoraSpec(rank=4, seed=seed), model.lora_shapes, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for pair in adapter.pairs.values():
        pair.b.normal_(generator=generator).mul_(spread)
    return adapter_files(adapter, "tiny")


def test_requests_of_different_adapters_share_steps(make_engine, model):
    specs = [
        request(f"r{i}", adapter=adapter, temperature=0.0, max_tokens=10, ignore_eos=True)
        for i, adapter in enumerate(["one", "", "two", "one", "", "two"])
    ]
    engine = make_engine()
    for i, key in enumerate(["one", "two"]):
        engine.add_adapter(key, adapter_of(model, i, 0.05))
    together = run(engine, specs)
    assert engine.stats.num_steps == 10
    alone = [run(engine, [spec])[spec.request_id].sequences[0] for spec in specs]
    assert len({tuple(tokens_of(sequence)) for sequence in alone}) == 3
    tolerance = 0 if rows_are_independent() else 1e-6
    for spec, lone in zip(specs, alone, strict=True):
        sequence = together[spec.request_id].sequences[0]
        assert tokens_of(sequence) == tokens_of(lone)
        one, other = (np.frombuffer(s.logprobs, "<f4") for s in (sequence, lone))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def test_rows_that_fill_up_a_step_change_nothing(make_engine, model):
    """30 and 39 rows, three fewer than a step has at least."""
    specs = [
        request(key, prompt=range(length), adapter=key, max_tokens=1, prompt_logprobs=True)
        for key, length in (("one", 30), ("two", 39))
    ]

    def engine() -> Engine:
        engine = make_engine()
        for seed, spec in enumerate(specs):
            engine.add_adapter(spec.adapter, adapter_of(model, seed, 0.05))
        return engine

    together = run(engine(), specs)
    tolerance = 0 if rows_are_independent() else 1e-6
    for spec in specs:
        lone = run(engine(), [spec])[spec.request_id]
        assert tokens_of(together[spec.request_id].sequences[0]) == tokens_of(lone.sequences[0])
        one, other = (
            np.frombuffer(answer.prompt_logprobs, "<f4")
            for answer in (together[spec.request_id], lone)
        )
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def test_steps_come_in_few_sizes(make_engine, model, monkeypatch):
    sizes, hidden, engine = set(), model.hidden, make_engine()
    monkeypatch.setattr(
        model, "hidden", lambda tokens, *rest: (sizes.add(len(tokens)), hidden(tokens, *rest))[1]
    )
    for length in range(1, 96):
        # Each begins with a token of its own: nothing is cached.
        run(engine, [request(prompt=[length] * length, max_tokens=1)])
    assert sizes == {*range(4, 65, 4), 72, 80, 88, 96}


def test_an_adapter_that_diverged_fails_its_own_request_only(make_engine, model):
    engine = make_engine(num_kv_blocks=5)
    engine.add_adapter("nan", adapter_of(model, 0, float("nan")))
    engine.add(LONG)
    engine.add(request("bad", adapter="nan", max_tokens=20))
    engine.add(request("bad at once", adapter="nan", max_tokens=1))
    [failed, failed_at_once, finished] = drain(engine)
    assert failed_at_once.request_id == "bad at once"
    assert (failed.request_id, failed.category) == ("bad", "user")
    assert "'nan'" in (failed.error or "")
    assert tokens_of(answer(finished).sequences[0]) == sampled(make_engine(), LONG)
    # Its blocks are used again, by a sequence that is padded beside a longer one.
    again = run(engine, [LONG, SHORT])
    assert tokens_of(again["short"].sequences[0]) == sampled(make_engine(), SHORT)


def test_an_adapter_in_use_is_not_evicted(make_engine, model):
    engine = make_engine(max_adapters=1, host_adapter_bytes=0)
    engine.add_adapter("used", adapter_of(model, 0, 0.05))
    engine.add(request("r", adapter="used", max_tokens=4, ignore_eos=True))
    engine.step()
    engine.add_adapter("next", adapter_of(model, 1, 0.05))
    assert engine.has_adapter("used")
    drain(engine)
    assert not engine.has_adapter("used")
    assert engine.has_adapter("next")


def test_versions_that_are_swapped_under_load_are_never_mixed_up(make_engine, model):
    """Every request gets the tokens of its own version, though most versions must come and go."""
    versions = {f"v{i}": adapter_of(model, i, 0.05) for i in range(12)}
    room = sum(len(data) for data in versions["v0"].values()) * 3

    def ask(engine: Engine, i: int, version: str) -> None:
        if not engine.has_adapter(version):
            engine.add_adapter(version, versions[version])
        spec = request(f"{i}", adapter=version, temperature=0.0, max_tokens=6, cache_scope="t")
        engine.add(replace(spec, prompt=tuple(range(20)), ignore_eos=True))

    expected = {}
    for version in versions:
        engine = make_engine()
        ask(engine, 0, version)
        expected[version] = tokens_of(answer(drain(engine)[0]).sequences[0])
    assert len({tuple(tokens) for tokens in expected.values()}) > 6
    engine = make_engine(max_adapters=2, host_adapter_bytes=room, max_running=4)
    random = np.random.default_rng(5)
    asked = [f"v{random.integers(12)}" for _ in range(80)]
    finished = []
    for i, version in enumerate(asked):
        ask(engine, i, version)
        finished += engine.step()
    finished += drain(engine)
    assert len(finished) == 80
    for each in finished:
        version = asked[int(each.request_id)]
        assert tokens_of(answer(each).sequences[0]) == expected[version]
    assert engine.stats.num_adapters == 2


def test_free_slots_count_every_sequence_that_is_to_run(make_engine):
    engine = make_engine(max_running=8)
    assert engine.num_free_slots == 8
    engine.add(replace(SHORT, num_samples=3))
    assert engine.num_free_slots == 5
    engine.add(replace(LONG, num_samples=30))
    assert engine.num_free_slots == 0
    drain(engine)
    assert engine.num_free_slots == 8


def test_topk_of_sampled_tokens_begins_with_the_greedy_token(make_engine):
    spec = request(temperature=0.0, max_tokens=5, ignore_eos=True, topk_sample_logprobs=3)
    sequence = run(make_engine(), [spec])["r"].sequences[0]
    table = sequence.topk_sampled_logprobs
    assert (table.length, table.k) == (5, 3)
    ids = np.frombuffer(table.token_ids, "<i4").reshape(5, 3)
    logprobs = np.frombuffer(table.logprobs, "<f4").reshape(5, 3)
    assert ids[:, 0].tolist() == tokens_of(sequence)
    assert logprobs[:, 0].tolist() == np.frombuffer(sequence.logprobs, "<f4").tolist()
    assert (np.diff(logprobs) <= 0).all()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (VOCAB_SIZE,)}, "259"),
        ({"prompt": (-1,)}, "prompt"),
        ({"prompt": (1,) * 97}, "context of 96"),
        ({"prompt": (1,) * 65}, "64 that this sampler's KV cache"),
        ({"num_samples": 0}, "num_samples"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 3}, "prompt_logprobs_last_n"),
        ({"topk_prompt_logprobs": 1000}, "from 0 to 100"),
        ({"stop_strings": ("",)}, "stop"),
        ({"adapter": "unknown"}, "unknown"),
    ],
)
def test_a_request_that_could_not_run_is_refused(make_engine, fields, named):
    engine = make_engine(num_kv_blocks=4)
    with pytest.raises(BadRequest, match=named):
        engine.add(request(**fields))
    assert not engine.has_work


def test_a_cache_smaller_than_the_context_bounds_the_sequence(make_engine):
    assert len(sampled(make_engine(num_kv_blocks=4), request(ignore_eos=True))) == 64 - 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_kv_blocks": 0, "kv_cache_bytes": 100}, "kv_cache_bytes"),
        ({"max_running": 9, "max_step_tokens": 8}, "max_step_tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(make_engine, settings, named):
    with pytest.raises(ConfigError, match=named):
        make_engine(**settings)


def test_what_follows_in_flight_weights_moves_with_them_under_load_and_nothing_else(
    make_engine, model, monkeypatch
):
    """Every step runs with the newest version, though versions come and go in mid-generation."""
    engine = make_engine(max_running=4, max_adapters=2)
    versions = [adapter_of(model, i, 0.05) for i in range(8)]
    engine.add_adapter("v0", versions[0])
    fixed = request("fixed", adapter="v0", temperature=0.0, max_tokens=30, ignore_eos=True)
    for i in range(6):
        moving = replace(fixed, request_id=f"{i}", prompt=(9, i), follows="run")
        engine.add(replace(moving, num_samples=i % 2 + 1))
    engine.add(fixed)
    newest = "v0"
    run_model = engine._runner.run

    def checked(chunks: Any) -> torch.Tensor:
        for chunk in chunks:
            expected = newest if chunk.sequence.request.spec.follows else "v0"
            assert chunk.sequence.request.adapter is engine._adapters._loaded[expected]
        return run_model(chunks)

    monkeypatch.setattr(engine._runner, "run", checked)
    finished = []
    for i, files in enumerate(versions[1:], 1):
        finished += [each for _ in range(4) for each in engine.step()]
        newest = f"v{i}"
        engine.add_adapter(newest, files)
        engine.move("run", newest)
    finished += drain(engine)
    answers = {each.request_id: answer(each) for each in finished}
    assert len(answers) == 7
    assert engine.stats.num_adapters == 2
    monkeypatch.undo()
    alone = make_engine()
    alone.add_adapter("v0", versions[0])
    assert tokens_of(answers["fixed"].sequences[0]) == sampled(alone, fixed)


def test_moved_weights_keep_the_cache_and_later_requests_do_not_share_it(make_engine, model):
    engine = make_engine()
    old, new = (adapter_of(model, i, 0.2) for i in range(2))
    engine.add_adapter("old", old)
    spec = request(
        adapter="old", follows="run", prompt=tuple(range(40)), temperature=0.0, cache_scope="s"
    )
    engine.add(replace(spec, max_tokens=30, ignore_eos=True))
    for _ in range(10):
        engine.step()
    num_computed = engine.stats.num_computed_tokens
    engine.add_adapter("new", new)
    engine.move("run", "new")
    engine.step()
    assert engine.stats.num_computed_tokens == num_computed + 1
    moved = tokens_of(answer(drain(engine)[0]).sequences[0])
    fresh = make_engine()
    lone = {}
    for key, files in (("old", old), ("new", new)):
        fresh.add_adapter(key, files)
        lone[key] = sampled(fresh, replace(spec, adapter=key, max_tokens=30, ignore_eos=True))
    assert moved[:10] == lone["old"][:10]
    assert moved[10:] != lone["old"][10:]
    later = replace(spec, adapter="new", max_tokens=30, ignore_eos=True)
    assert sampled(engine, later) == lone["new"]
