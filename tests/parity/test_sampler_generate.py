"""The sampler against plain transformers and against the trainer's forward, on the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from luthier_core.config import SamplerConfig
from luthier_core.prompt_targets import PromptTargets
from luthier_core.proto import wire_pb2
from luthier_model.attention import PackedAttention
from luthier_model.base import BaseModel, load_base_model
from luthier_model.logprobs import token_logprobs
from luthier_model.lora import LoraSpec, Segment, init_adapter
from luthier_model.packed_linear import pack_linears
from luthier_model.peft_io import adapter_files, adapter_from_files
from luthier_sampler import runner
from luthier_sampler.engine import Engine
from luthier_sampler.sequence import SampleRequest

NUM_NEW_TOKENS = 24
PROMPT_LENGTHS = (1, 5, 16, 31, 60)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> BaseModel:
    """As the sampler loads it."""
    torch.set_num_threads(1)
    model = load_base_model("tiny", model_folder)
    pack_linears(model)
    return model


@pytest.fixture(scope="module")
def trainer_model(model_folder: Path) -> BaseModel:
    """As the trainer loads it."""
    return load_base_model("tiny", model_folder)


@pytest.fixture(scope="module")
def lora_files(model: BaseModel) -> dict[str, bytes]:
    """A rank-8 adapter large enough to change every answer."""
    adapter = init_adapter(LoraSpec(rank=8, seed=1), model.lora_shapes, "cpu")
    generator = torch.Generator().manual_seed(5)
    for pair in adapter.pairs.values():
        pair.b.normal_(std=0.02, generator=generator)
    return adapter_files(adapter, "tiny")


@pytest.fixture(scope="module")
def prompts(model: BaseModel) -> list[list[int]]:
    random = np.random.default_rng(6)
    return [random.integers(0, model.facts.vocab_size, n).tolist() for n in PROMPT_LENGTHS]


def small_engine(model: BaseModel) -> Engine:
    """Steps so small that the longer prompts are prefilled in several chunks."""
    config = SamplerConfig(kv_block_tokens=8, num_kv_blocks=100, max_step_tokens=20, max_running=8)
    return Engine(model, None, config)  # type: ignore[arg-type]  # no request has stop strings


def answers(engine: Engine, specs: list[SampleRequest]) -> list[wire_pb2.SampleResponse]:
    for spec in specs:
        engine.add(spec)
    found: dict[str, wire_pb2.SampleResponse] = {}
    while engine.has_work:
        for finished in engine.step():
            assert finished.response is not None, finished.error
            found[finished.request_id] = wire_pb2.SampleResponse.FromString(finished.response)
    return [found[spec.request_id] for spec in specs]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_greedy_tokens_are_those_of_generate(
    model, model_folder, lora_files, prompts, tmp_path, adapter
):
    engine = small_engine(model)
    reference = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    # Not min_new_tokens: that would take EOS out of the logits.
    reference.generation_config.eos_token_id = None
    if adapter:
        engine.add_adapter(adapter, lora_files)
        for name, data in lora_files.items():
            (tmp_path / name).write_bytes(data)
        reference = PeftModel.from_pretrained(reference, tmp_path)
    specs = [
        SampleRequest(
            request_id=str(i),
            prompt=prompt,
            temperature=0.0,
            max_tokens=NUM_NEW_TOKENS,
            ignore_eos=True,
            adapter=adapter,
        )
        for i, prompt in enumerate(prompts)
    ]
    deviation = 0.0
    for prompt, response in zip(prompts, answers(engine, specs), strict=True):
        expected, logprobs = generate(reference, prompt)
        assert np.frombuffer(response.sequences[0].tokens, "<i4").tolist() == expected
        got = np.frombuffer(response.sequences[0].logprobs, "<f4")
        deviation = max(deviation, float(np.abs(got - logprobs).max()))
    print(f"{adapter or 'base'}: logprobs of greedy tokens differ by at most {deviation:.1e}")
    assert deviation < 1e-5


def generate(reference: torch.nn.Module, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """transformers' greedy continuation, and its logprobs."""
    out = reference.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[0, len(prompt) :]
    logprobs = torch.cat(out.logits).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs.numpy()


@pytest.mark.parametrize("adapter", ["", "lora"])
def test_prompt_logprobs_are_those_of_the_trainers_forward(
    model, trainer_model, lora_files, prompts, adapter, monkeypatch
):
    monkeypatch.setattr(runner, "SCORE_CHUNK_TOKENS", 7)  # Several in one prefill chunk.
    engine = small_engine(model)
    if adapter:
        engine.add_adapter(adapter, lora_files)
    specs = [
        SampleRequest(
            request_id=str(i),
            prompt=prompt,
            max_tokens=1,
            num_samples=2,
            adapter=adapter,
            prompt_logprobs=True,
            topk_prompt_logprobs=3,
        )
        for i, prompt in enumerate(prompts)
    ]
    loaded = adapter_from_files(lora_files, model.lora_shapes, "cpu") if adapter else None
    expected = packed_logprobs(trainer_model, prompts, loaded)
    deviation = 0.0
    for prompt, wanted, response in zip(prompts, expected, answers(engine, specs), strict=True):
        got = np.frombuffer(response.prompt_logprobs, "<f4")
        assert len(got) == len(prompt)
        assert np.isnan(got[0])
        assert not np.isnan(got[1:]).any()
        deviation = max(deviation, float(np.abs(got[1:] - wanted).max(initial=0.0)))
        check_topk(prompt, got, response.topk_prompt_logprobs)
    print(f"{adapter or 'base'}: prompt logprobs differ by at most {deviation:.1e}")
    assert deviation < 1e-5


def packed_logprobs(
    model: BaseModel, prompts: list[list[int]], adapter: object
) -> list[np.ndarray]:
    """Logprobs of tokens 1.. of each prompt, all prompts in one packed forward."""
    lengths = [len(prompt) for prompt in prompts]
    tokens_T = torch.tensor([token for prompt in prompts for token in prompt])
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    segments = [Segment(0, len(tokens_T), adapter)]  # type: ignore[arg-type]
    with torch.no_grad():
        hidden_TD = model.hidden(tokens_T, positions_T, PackedAttention(lengths), segments)
        scores_T = token_logprobs(
            model, hidden_TD, tokens_T.roll(-1), segments, chunk_tokens=len(tokens_T)
        )
    return [scores[:-1].numpy() for scores in torch.split(scores_T, lengths)]


def check_topk(prompt: list[int], scores: np.ndarray, table: wire_pb2.TopkLogprobs) -> None:
    """Rows are sorted, row 0 is filler, and a prompt token in its row has its score there."""
    assert (table.length, table.k) == (len(prompt), 3)
    ids = np.frombuffer(table.token_ids, "<i4").reshape(-1, 3)
    logprobs = np.frombuffer(table.logprobs, "<f4").reshape(-1, 3)
    assert ids[0].tolist() == [0, 0, 0]
    assert (logprobs[0] == np.float32(-99999.0)).all()
    assert (np.diff(logprobs[1:]) <= 0).all()
    for token, score, row_ids, row in zip(
        prompt[1:], scores[1:], ids[1:], logprobs[1:], strict=True
    ):
        assert score <= row[0]
        if token in row_ids:
            assert score == row[row_ids.tolist().index(token)]
        else:
            assert score <= row[-1]


def test_every_way_to_score_a_prompt_gives_the_trainers_logprobs(
    model, trainer_model, prompts, monkeypatch
):
    monkeypatch.setattr(runner, "SCORE_CHUNK_TOKENS", 7)
    prompt = prompts[-1]
    expected = packed_table(trainer_model, prompt)
    random = np.random.default_rng(3)
    cells = random.integers(-1, model.facts.vocab_size, (len(prompt) - 1, 2))
    csr = {"sparse_crow_indices": [0] * 40 + [3] * 20, "sparse_col_indices": [0, 1, 2]}
    tensors = [
        {"data": cells.ravel().tolist(), "dtype": "int64", "shape": [len(prompt) - 1, 2]},
        {"data": [7, -1, 9], "dtype": "int64", "shape": [len(prompt) - 1, 3], **csr},
    ]
    specs = [
        SampleRequest(
            request_id=str(i),
            prompt=prompt,
            max_tokens=1,
            temperature=2.0,
            seed=3,
            prompt_logprobs=True,
            prompt_logprobs_last_n=n,
            prompt_alt_tokens_k=2,
            target_prompt_logprobs=PromptTargets.parse(tensor, len(prompt)),
        )
        for i, (tensor, n) in enumerate(zip(tensors, (4, 59), strict=True))
    ]
    dense, sparse = answers(small_engine(model), specs)
    got = np.frombuffer(dense.prompt_logprobs, "<f4")
    assert np.isnan(got[:-4]).all()
    wanted = expected[np.arange(59), prompt[1:]]
    np.testing.assert_allclose(got[-4:], wanted[-4:], rtol=0, atol=1e-5)
    got = np.frombuffer(sparse.prompt_logprobs, "<f4")
    np.testing.assert_allclose(got[1:], wanted, rtol=0, atol=1e-5)
    scored = np.frombuffer(dense.target_prompt_logprobs.dense, "<f4").reshape(cells.shape)
    wanted = np.where(cells < 0, 0, np.take_along_axis(expected, np.maximum(cells, 0), 1))
    np.testing.assert_allclose(scored, wanted, rtol=0, atol=1e-5)
    assert list(sparse.target_prompt_logprobs.shape) == [59, 3]
    values = np.frombuffer(sparse.target_prompt_logprobs.sparse_csr.values, "<f4")
    np.testing.assert_allclose(values, [expected[39, 7], 0, expected[39, 9]], rtol=0, atol=1e-5)
    for response in (dense, sparse):
        alternatives = response.prompt_alt_tokens
        assert list(alternatives.tokens.shape) == list(alternatives.logprobs.shape) == [59, 2]
        tokens = np.frombuffer(alternatives.tokens.dense, "<i8").reshape(59, 2)
        wanted = np.take_along_axis(expected, tokens, 1)
        got = np.frombuffer(alternatives.logprobs.dense, "<f4").reshape(59, 2)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    assert dense.prompt_alt_tokens == sparse.prompt_alt_tokens


def packed_table(model: BaseModel, prompt: list[int]) -> np.ndarray:
    """[len(prompt) - 1, V]: every token's logprob at each position after the first."""
    targets = torch.arange(model.facts.vocab_size).expand(len(prompt), -1)
    tokens_T, positions_T = torch.tensor(prompt), torch.arange(len(prompt))
    segments = [Segment(0, len(prompt), None)]
    with torch.no_grad():
        hidden_TD = model.hidden(tokens_T, positions_T, PackedAttention([len(prompt)]), segments)
        table = token_logprobs(model, hidden_TD, targets, segments, chunk_tokens=len(prompt))
    return table[:-1].numpy()
