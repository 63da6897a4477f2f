"""Sampling: the batched code beside a plain one, and the distribution that comes out."""

import math

import numpy as np
import pytest
import torch

from luthier_sampler.drawing import argmax, draw, truncate, truncate_by_sort
from luthier_sampler.sampling import sample, uniform
from luthier_sampler.scores import FILLER_LOGPROB, FILLER_TOKEN, most_likely
from luthier_sampler.sequence import SampleRequest

VOCAB_SIZE = 50
PARAMETERS = [
    (1.0, -1, 1.0),
    (0.0, -1, 1.0),
    (0.5, 3, 1.0),
    (2.0, -1, 0.7),
    (1.5, 10, 0.4),
    (1.0, 1, 1.0),
    (1.0, -1, 1e-9),
    (1.0, 500, 0.999),
    (1.0, 0, 1.0),
]


def spec(temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> SampleRequest:
    return SampleRequest(
        request_id="r", prompt=(1,), temperature=temperature, top_k=top_k, top_p=top_p
    )


def sample_one(logits: list[float], request: SampleRequest, number: float) -> int:
    """Reference for sample: one row, plain Python."""
    if request.temperature == 0:
        return max(range(len(logits)), key=lambda token: logits[token])
    weights = {t: math.exp(logit / request.temperature) for t, logit in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])
    ranked = ranked[: request.top_k] if request.top_k > 0 else ranked
    total, before, kept = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        if not kept or before / total < request.top_p:
            kept.append(token)
        before += weights[token]
    passed, aim = 0.0, number * sum(weights[token] for token in kept)
    for token in sorted(kept):
        passed += weights[token]
        if passed > aim:
            return token
    return max(kept)


def test_a_batch_draws_what_the_plain_reference_draws():
    random = np.random.default_rng(0)
    specs = [spec(*parameters) for parameters in PARAMETERS]
    for _ in range(100):
        logits = torch.tensor(random.normal(0, 2, (len(specs), VOCAB_SIZE)), dtype=torch.float32)
        numbers = random.random(len(specs)).tolist()
        tokens, _ = sample(logits, specs, numbers)
        rows = zip(logits.tolist(), specs, numbers, strict=True)
        assert tokens.tolist() == [sample_one(*row) for row in rows]


def test_frequencies_are_the_model_probabilities():
    logits = torch.tensor([[2.0, 0.0, -1.0, -torch.inf, 1.0]])
    num_draws = 20_000
    numbers = torch.tensor([[uniform(7, position)] for position in range(num_draws)])
    tokens = draw(logits.log_softmax(-1), numbers.double().T)[0]
    frequencies = tokens.bincount(minlength=5) / num_draws
    expected = logits.softmax(-1)[0]
    print(f"largest deviation of a frequency: {(frequencies - expected).abs().max():.4f}")
    # Four standard deviations of the least certain one.
    assert (frequencies - expected).abs().max() < 4 * 0.5 / math.sqrt(num_draws)
    assert frequencies[3] == 0


def test_uniform_numbers_depend_on_seed_and_position_only():
    assert uniform(3, 4) == uniform(3, 4)
    numbers = {uniform(seed, position) for seed in range(-5, 40) for position in range(40)}
    assert len(numbers) == 45 * 40
    assert all(0 <= number < 1 for number in numbers)


def test_the_largest_uniform_number_never_draws_an_impossible_token():
    logprobs = torch.full((1, 8), -torch.inf)
    logprobs[0, 2] = logprobs[0, 5] = math.log(0.05)
    assert draw(logprobs, torch.tensor([[1 - 2**-52]], dtype=torch.float64)).tolist() == [[5]]
    assert draw(logprobs, torch.zeros(1, 1, dtype=torch.float64)).tolist() == [[2]]


def test_of_equally_likely_tokens_top_k_keeps_the_lowest_ids():
    kept = truncate(torch.zeros(1, 6).log_softmax(-1), [2], [1.0])
    assert kept.isfinite().tolist() == [[True, True, False, False, False, False]]


def test_a_vocabulary_is_truncated_by_few_candidates_as_by_sorting():
    random = np.random.default_rng(1)
    parameters = [(0, 0.9), (50, 1.0), (20, 0.5), (-1, 0.9999), (1, 1.0), (400, 0.99), (-1, 1.0)]
    spread = [8.0, 2.0, 2.0, 0.1, 2.0, 1.0, 1.0]
    logits = random.normal(0, 1, (len(parameters), 5000)) * np.array(spread)[:, None]
    # Rounded rows have equals everywhere, also where the kept ones end.
    for logits_BV in (torch.tensor(logits).float(), torch.tensor(logits.round(1)).float()):
        rows = logits_BV.log_softmax(-1), *zip(*parameters, strict=True)
        fast, slow = truncate(*rows), truncate_by_sort(*rows)
        assert torch.equal(fast.isfinite(), slow.isfinite())
        assert torch.equal(fast[fast.isfinite()], slow[slow.isfinite()])


@pytest.mark.parametrize("vocab_size", [1, 128, 300])
def test_the_greedy_token_is_the_first_of_the_highest(vocab_size):
    random = np.random.default_rng(2)
    scores = torch.tensor(random.integers(0, 9, (40, vocab_size))).float()
    assert argmax(scores).tolist() == scores.numpy().argmax(-1).tolist()


def test_top_p_counts_what_top_k_left():
    logprobs = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two that top_k leaves the first holds 0.57 of the probability, in the whole only 0.4.
    assert truncate(logprobs, [2], [0.5]).isfinite().sum() == 1
    assert truncate(logprobs, [-1], [0.5]).isfinite().sum() == 2


@pytest.mark.parametrize("tempered", [False, True])
def test_logprobs_are_raw_or_tempered_but_raw_when_greedy(tempered):
    logits = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    specs = [spec(temperature=0.5, top_k=1), spec(temperature=0.0)]
    _, logprobs = sample(logits, specs, [0.1, 0.1], tempered=tempered)
    raw = logits[0].log_softmax(-1)
    expected = (logits[0] / 0.5).log_softmax(-1) if tempered else raw
    assert torch.equal(logprobs[0], expected)
    assert torch.equal(logprobs[1], raw)


def test_a_top_table_is_filled_up_beyond_the_vocabulary():
    table = most_likely(torch.tensor([[-2.0, -1.0, -3.0]]), 5)
    assert table.token_ids.tolist() == [[1, 0, 2, FILLER_TOKEN, FILLER_TOKEN]]
    assert table.logprobs.tolist() == [
        [-1, -2, -3, np.float32(FILLER_LOGPROB), np.float32(FILLER_LOGPROB)]
    ]
