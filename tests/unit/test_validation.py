"""What is refused before admission, with which words; and that what passes can be executed."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.tiny_qwen3 import save_tiny_qwen3

from luthier_core.errors import BadRequest, InvalidField, Unreadable, Unsupported
from luthier_core.proto import wire_pb2
from luthier_core.types import Sample, check
from luthier_core.validation import (
    MAX_SCORE_CELLS,
    MAX_TARGET_CELLS,
    ModelLimits,
    check_forward_backward,
    check_sample,
    parse_forward_backward,
)
from luthier_model.base import load_base_model
from luthier_model.lora import LoraSpec
from luthier_trainer.engine import Engine

LIMITS = ModelLimits(
    vocab_size=67,
    max_context_tokens=16,
    max_datums=4,
    max_tokens_per_request=40,
    max_num_samples=8,
)
FLOAT, INT = wire_pb2.DTYPE_FLOAT32, wire_pb2.DTYPE_INT64
_FORMATS = {FLOAT: "<f4", INT: "<i8", wire_pb2.DTYPE_INT32: "<i4"}


def tensor(values: object, dtype: int = INT, shape: tuple[int, ...] = ()) -> wire_pb2.Tensor:
    array = np.array(values, dtype=_FORMATS.get(dtype, "<f4"))
    return wire_pb2.Tensor(dense=array.tobytes(), dtype=dtype, shape=shape)


def csr(
    values: list[float],
    rows: list[int],
    columns: list[int],
    shape: tuple[int, ...],
    dtype: int = INT,
) -> wire_pb2.Tensor:
    sparse = wire_pb2.SparseCsr(
        values=np.array(values, _FORMATS[dtype]).tobytes(),
        crow_indices=np.array(rows, "<i8").tobytes(),
        col_indices=np.array(columns, "<i8").tobytes(),
    )
    return wire_pb2.Tensor(sparse_csr=sparse, dtype=dtype, shape=shape)


def text(tokens: list[int]) -> wire_pb2.Chunk:
    data = np.array(tokens, "<i4").tobytes()
    return wire_pb2.Chunk(encoded_text=wire_pb2.EncodedTextChunk(tokens=data))


def datum(
    tokens: list[int] | wire_pb2.Chunk = (1, 2, 3), **inputs: wire_pb2.Tensor | None
) -> wire_pb2.Datum:
    """A good datum of three tokens; an input that is None is left out."""
    chunk = tokens if isinstance(tokens, wire_pb2.Chunk) else text(list(tokens))
    wanted = {"target_tokens": tensor([2, 3, 4]), "weights": tensor([0, 1, 1], FLOAT), **inputs}
    given = {name: value for name, value in wanted.items() if value is not None}
    return wire_pb2.Datum(model_input=[chunk], loss_fn_inputs=given)


def request(
    *data: wire_pb2.Datum, loss_fn: str = "cross_entropy"
) -> wire_pb2.ForwardBackwardRequest:
    return wire_pb2.ForwardBackwardRequest(model_id="r", seq_id=1, loss_fn=loss_fn, data=data)


def policy_datum(**inputs: wire_pb2.Tensor | None) -> wire_pb2.Datum:
    """A good datum for the policy losses; an input that is None is left out."""
    given = {
        "weights": None,
        "logprobs": tensor([0, -1, -2], FLOAT),
        "advantages": tensor([0, 1, -1], FLOAT),
    }
    return datum(**{**given, **inputs})


def of_length(length: int) -> wire_pb2.Datum:
    return datum(
        [1] * length, target_tokens=tensor([1] * length), weights=tensor([1] * length, FLOAT)
    )


SPAN = wire_pb2.ProvenanceSpan(
    sampled_tokens=wire_pb2.SampledProvenanceSpan(sequence_id="s:sample:0:0:0", offset=0, length=3)
)

GOOD_REQUESTS = {
    "one datum": request(datum()),
    "several datums": request(datum(), of_length(16), of_length(1)),
    "two chunks": request(
        wire_pb2.Datum(
            model_input=[text([1]), text([]), text([2, 3])],
            loss_fn_inputs=datum().loss_fn_inputs,
        )
    ),
    "shape given": request(
        datum(target_tokens=tensor([2, 3, 4], shape=(3,)), weights=tensor([0, 1, 1], FLOAT, (3,)))
    ),
    "two targets per position": request(
        datum(
            target_tokens=tensor([2, 3, 4, 5, 6, 7], shape=(3, 2)),
            weights=tensor([0, 1, 1, 0, -2, 9], FLOAT, (3, 2)),
        )
    ),
    "sparse": request(
        datum(
            target_tokens=csr([5, 6], [0, 1, 1, 2], [1, 0], (3, 2)),
            weights=csr([0.5], [0, 1, 1, 1], [1], (3, 2), FLOAT),
        )
    ),
    "spans that say where tokens come from": request(
        wire_pb2.Datum(
            model_input=datum().model_input,
            loss_fn_inputs=datum().loss_fn_inputs,
            model_input_spans=[SPAN],
            loss_fn_input_spans=[SPAN],
        )
    ),
    "an input that no loss knows": request(datum(mask=tensor([1], wire_pb2.DTYPE_BFLOAT16))),
    **{
        name: request(policy_datum(), loss_fn=name)
        for name in ("importance_sampling", "ppo", "cispo", "dro", "gspo")
    },
    "thresholds by token in one datum": request(
        policy_datum(clip_high_threshold=tensor([1, 2, 3], FLOAT)), policy_datum(), loss_fn="ppo"
    ),
    "a mask of the ratio": request(
        policy_datum(sequence_ratio_mask=tensor([0, 1, 1], FLOAT)), loss_fn="gspo"
    ),
    "a policy loss with two targets per position": request(
        policy_datum(
            target_tokens=tensor([2, 3, 4, 5, 6, 7], shape=(3, 2)),
            logprobs=tensor([-1] * 6, FLOAT, (3, 2)),
            advantages=tensor([1] * 6, FLOAT, (3, 2)),
        ),
        policy_datum(),
        loss_fn="dro",
    ),
    "settings": wire_pb2.ForwardBackwardRequest(
        loss_fn="cispo", data=[policy_datum()], loss_fn_config={"clip_high_threshold": 2.0}
    ),
    "the last token id": request(datum([66, 0, 66], target_tokens=tensor([66, 0, 66]))),
}

REFUSALS = {
    "unknown loss": (request(datum(), loss_fn="mse"), "loss_fn: 'mse'", "cross_entropy"),
    "no loss": (request(datum(), loss_fn=""), "loss_fn", "cross_entropy"),
    "a loss whose formula is a secret": (
        request(datum(), loss_fn="stable_reinforce"),
        "loss_fn: 'stable_reinforce'",
        "importance_sampling",
    ),
    "a setting that the loss does not have": (
        wire_pb2.ForwardBackwardRequest(
            loss_fn="ppo", data=[policy_datum()], loss_fn_config={"clip_range": 0.2}
        ),
        "loss_fn_config.clip_range",
        "['clip_high_threshold', 'clip_low_threshold']",
    ),
    "missing logprobs": (
        request(policy_datum(logprobs=None), loss_fn="ppo"),
        "data[0].loss_fn_inputs.logprobs: missing",
        "['target_tokens', 'logprobs', 'advantages']",
    ),
    "missing advantages": (
        request(policy_datum(advantages=None), loss_fn="gspo"),
        "data[0].loss_fn_inputs.advantages: missing",
        "['target_tokens', 'logprobs', 'advantages']",
    ),
    "too few thresholds": (
        request(policy_datum(clip_low_threshold=tensor([1, 1], FLOAT)), loss_fn="cispo"),
        "data[0].loss_fn_inputs.clip_low_threshold: shape [2]",
        "[3] or [3, K]",
    ),
    "a negative threshold": (
        request(policy_datum(clip_low_threshold=tensor([0, 1, -1], FLOAT)), loss_fn="cispo"),
        "data[0].loss_fn_inputs.clip_low_threshold",
        "at least 0",
    ),
    "a mask of the ratio that weighs": (
        request(policy_datum(sequence_ratio_mask=tensor([0, 0.5, 1], FLOAT)), loss_fn="gspo"),
        "data[0].loss_fn_inputs.sequence_ratio_mask",
        "0 or 1",
    ),
    "empty batch": (request(), "data: empty", "at least one datum"),
    "too many datums": (request(*[of_length(1)] * 5), "data: 5 datums", "at most 4"),
    "too many tokens": (request(*[of_length(14)] * 3), "data: 42 tokens", "at most 40"),
    "missing target_tokens": (
        request(datum(), datum(target_tokens=None)),
        "data[1].loss_fn_inputs.target_tokens: missing",
        "['target_tokens', 'weights']",
    ),
    "missing weights": (
        request(datum(weights=None)),
        "data[0].loss_fn_inputs.weights: missing",
        "['target_tokens', 'weights']",
    ),
    "too few targets": (
        request(datum(target_tokens=tensor([2, 3]))),
        "data[0].loss_fn_inputs.target_tokens: shape [2]",
        "[3] or [3, K]",
    ),
    "too few weights": (
        request(datum(weights=tensor([1, 1], FLOAT))),
        "data[0].loss_fn_inputs.weights: shape [2]",
        "[3] or [3, K]",
    ),
    "weights of another width": (
        request(datum(weights=tensor([1] * 6, FLOAT, (3, 2)))),
        "data[0].loss_fn_inputs.weights: shape [3, 2]",
        "target_tokens has [3]",
    ),
    "three dimensions": (
        request(datum(target_tokens=tensor([1, 2, 3], shape=(3, 1, 1)))),
        "data[0].loss_fn_inputs.target_tokens: shape [3, 1, 1]",
        "[3] or [3, K]",
    ),
    "no targets per position": (
        request(
            datum(target_tokens=tensor([], shape=(3, 0)), weights=tensor([], FLOAT, (3, 0))),
        ),
        "data[0].loss_fn_inputs.target_tokens: shape [3, 0]",
        "K at least 1",
    ),
    "input token beyond the vocabulary": (
        request(datum([1, 67, 2])),
        "data[0].model_input: token id 67 at position 1",
        "0 to 66",
    ),
    "negative input token": (
        request(datum([1, 2, -1])),
        "data[0].model_input: token id -1 at position 2",
        "0 to 66",
    ),
    "target beyond the vocabulary": (
        request(datum(target_tokens=tensor([1, 2, 10**12]))),
        "data[0].loss_fn_inputs.target_tokens: token id 1000000000000 at position 2",
        "0 to 66",
    ),
    "sparse target beyond the vocabulary": (
        request(
            datum(
                target_tokens=csr([70], [0, 1, 1, 1], [1], (3, 2)),
                weights=csr([1], [0, 1, 1, 1], [1], (3, 2), FLOAT),
            )
        ),
        "data[0].loss_fn_inputs.target_tokens: token id 70",
        "0 to 66",
    ),
    "context over the limit": (
        request(of_length(17)),
        "data[0].model_input: 17 tokens",
        "context has 16",
    ),
    "no tokens": (
        request(datum([])),
        "data[0].model_input: empty",
        "at least one token",
    ),
    "no chunks": (
        request(wire_pb2.Datum(loss_fn_inputs=datum().loss_fn_inputs)),
        "data[0].model_input: empty",
        "at least one token",
    ),
    "ragged token bytes": (
        request(
            datum(wire_pb2.Chunk(encoded_text=wire_pb2.EncodedTextChunk(tokens=b"12345"))),
        ),
        "data[0].model_input",
        "a multiple of 4 bytes",
    ),
    "target_tokens as float32": (
        request(datum(target_tokens=tensor([1, 2, 3], FLOAT))),
        "data[0].loss_fn_inputs.target_tokens.dtype",
        "DTYPE_INT64",
    ),
    "weights as bfloat16": (
        request(datum(weights=wire_pb2.Tensor(dense=b"123456", dtype=wire_pb2.DTYPE_BFLOAT16))),
        "data[0].loss_fn_inputs.weights.dtype: 4",
        "FLOAT32 (1) or INT64 (2)",
    ),
    "no dtype": (
        request(datum(weights=wire_pb2.Tensor(dense=b"123456781234"))),
        "data[0].loss_fn_inputs.weights.dtype: 0",
        "FLOAT32 (1) or INT64 (2)",
    ),
    "weight not a number": (
        request(datum(weights=tensor([1, np.nan, 1], FLOAT))),
        "data[0].loss_fn_inputs.weights",
        "finite",
    ),
    "infinite weight": (
        request(datum(weights=tensor([1, 1, -np.inf], FLOAT))),
        "data[0].loss_fn_inputs.weights",
        "finite",
    ),
    "ragged float bytes": (
        request(datum(weights=wire_pb2.Tensor(dense=b"1234567890123", dtype=FLOAT))),
        "data[0].loss_fn_inputs.weights: 13 bytes",
        "float32",
    ),
    "values do not fill the shape": (
        request(datum(target_tokens=tensor([1, 2], shape=(3,)))),
        "data[0].loss_fn_inputs.target_tokens: 2 values",
        "[3]",
    ),
    "no values at all": (
        request(datum(weights=wire_pb2.Tensor(dtype=FLOAT))),
        "data[0].loss_fn_inputs.weights: shape [0]",
        "[3] or [3, K]",
    ),
    "negative size": (
        request(datum(target_tokens=tensor([1, 2, 3], shape=(-3, -1)))),
        "data[0].loss_fn_inputs.target_tokens.shape: [-3, -1]",
        "negative",
    ),
    "shape overflows 64 bits": (
        request(datum(target_tokens=tensor([1, 2, 3], shape=(2**32, 2**32)))),
        "data[0].loss_fn_inputs.target_tokens.shape",
        "enormous",
    ),
    "sparse without a shape": (
        request(datum(weights=csr([1], [0, 1], [0], (), FLOAT))),
        "data[0].loss_fn_inputs.weights.shape: []",
        "[rows, columns]",
    ),
    "sparse column outside": (
        request(datum(weights=csr([1], [0, 1, 1, 1], [2], (3, 2), FLOAT))),
        "data[0].loss_fn_inputs.weights: CSR indices",
        "[3, 2]",
    ),
    "sparse negative column": (
        request(datum(weights=csr([1], [0, 1, 1, 1], [-1], (3, 2), FLOAT))),
        "data[0].loss_fn_inputs.weights: CSR indices",
        "[3, 2]",
    ),
    "sparse rows go back": (
        request(datum(weights=csr([1, 1], [0, 2, 1, 2], [0, 1], (3, 2), FLOAT))),
        "data[0].loss_fn_inputs.weights: CSR indices",
        "[3, 2]",
    ),
    "sparse rows too few": (
        request(datum(weights=csr([1], [0, 1], [0], (3, 2), FLOAT))),
        "data[0].loss_fn_inputs.weights: CSR indices",
        "[3, 2]",
    ),
    "sparse rows do not begin at 0": (
        request(datum(weights=csr([1, 1], [1, 1, 1, 2], [0, 1], (3, 2), FLOAT))),
        "data[0].loss_fn_inputs.weights: CSR indices",
        "[3, 2]",
    ),
    "sparse rows end before the values": (
        request(datum(weights=csr([1, 1], [0, 1, 1, 1], [0, 1], (3, 2), FLOAT))),
        "data[0].loss_fn_inputs.weights: CSR indices",
        "[3, 2]",
    ),
    "sparse ragged index bytes": (
        request(
            datum(
                weights=wire_pb2.Tensor(
                    sparse_csr=wire_pb2.SparseCsr(crow_indices=b"1234567"),
                    dtype=FLOAT,
                    shape=(3, 2),
                )
            )
        ),
        "data[0].loss_fn_inputs.weights: CSR indices",
        "int64",
    ),
    "a wide sparse matrix of nothing": (
        request(
            datum(
                target_tokens=csr([], [0, 0, 0, 0], [], (3, 2**29)),
                weights=csr([], [0, 0, 0, 0], [], (3, 2**29), FLOAT),
            )
        ),
        "data: 3 tokens with up to 536870912 targets each",
        f"at most {MAX_TARGET_CELLS}",
    ),
    "a wide datum that would widen its neighbours": (
        request(
            of_length(16),
            datum(
                [1],
                target_tokens=csr([], [0, 0], [], (1, MAX_TARGET_CELLS // 16)),
                weights=csr([], [0, 0], [], (1, MAX_TARGET_CELLS // 16), FLOAT),
            ),
        ),
        "data: 17 tokens with up to",
        f"at most {MAX_TARGET_CELLS}",
    ),
}


@pytest.mark.parametrize("name", GOOD_REQUESTS)
def test_a_good_request_passes_and_its_tokens_are_counted(name: str):
    message = GOOD_REQUESTS[name]
    num_tokens = sum(
        len(chunk.encoded_text.tokens) // 4 for datum in message.data for chunk in datum.model_input
    )
    assert check_forward_backward(message, LIMITS) == num_tokens


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_the_field_and_what_is_allowed(name: str):
    message, field, allowed = REFUSALS[name]
    with pytest.raises((InvalidField, Unsupported)) as refused:
        check_forward_backward(message, LIMITS)
    sentence = refused.value.message
    assert field in sentence
    assert allowed in sentence[sentence.index(field) :]


def test_limits_are_inclusive():
    check_forward_backward(request(*[of_length(1)] * LIMITS.max_datums), LIMITS)
    check_forward_backward(request(of_length(LIMITS.max_context_tokens)), LIMITS)
    exact = replace(LIMITS, max_tokens_per_request=3)
    assert check_forward_backward(request(datum()), exact) == 3


@pytest.mark.parametrize(
    ("chunk", "kind"),
    [
        (wire_pb2.Chunk(image=wire_pb2.ImageChunk(data=b"\x89PNG", format="png")), "'image'"),
        (wire_pb2.Chunk(dmel=wire_pb2.DmelChunk(dmel=b"\0")), "'dmel'"),
        (wire_pb2.Chunk(), "None"),
    ],
)
def test_a_chunk_that_is_no_text_is_refused_with_its_type(chunk: wire_pb2.Chunk, kind: str):
    with pytest.raises(Unsupported) as refused:
        check_forward_backward(request(datum(chunk)), LIMITS)
    assert f"data[0].model_input: chunk of type {kind}" in refused.value.message
    assert "'encoded_text'" in refused.value.message


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05ab", b'{"model_id": "json"}'])
def test_bytes_that_are_no_request_are_unreadable(body: bytes):
    with pytest.raises(Unreadable, match="ForwardBackwardRequest"):
        parse_forward_backward(body)


# --- whatever passes can be executed --------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = save_tiny_qwen3(
        tmp_path_factory.mktemp("model"),
        seed=7,
        vocab_size=LIMITS.vocab_size,
        max_position_embeddings=LIMITS.max_context_tokens,
    )
    engine = Engine(load_base_model("tiny", folder), logprob_chunk_tokens=8, num_threads=1)
    engine.create("r", LoraSpec(rank=1, seed=1))
    return engine


def execute_if_admitted(engine: Engine, body: bytes) -> bool:
    """Whether the bytes were admitted; any error but a refusal passes through."""
    try:
        message = parse_forward_backward(body)
        check_forward_backward(message, LIMITS)
    except (BadRequest, Unreadable):
        return False
    answer = engine.forward_backward("r", body, backward=True, clock_cycle=0)
    output = wire_pb2.ForwardBackwardOutput.FromString(answer)
    assert sum(record.num_datums for record in output.loss_fn_outputs) == len(message.data)
    return True


SIZES = st.one_of(st.integers(0, 5), st.sampled_from([-1, 16, 17, 2**31, 2**62, -(2**63)]))
FINITE = st.floats(width=32, min_value=-100, max_value=100)
INTS = st.one_of(st.integers(0, 66), st.integers(-(2**63), 2**63 - 1))


@st.composite
def wire_tensors(draw: st.DrawFn, length: int, dtype: int) -> wire_pb2.Tensor:
    """Mostly one that fits `length` positions; sometimes anything at all."""
    elements = st.integers(0, 66) if dtype == INT else FINITE
    width = draw(st.sampled_from([0, 0, 1, 2, 3]))
    form = draw(st.sampled_from(["dense", "dense", "csr", "any", "any csr"]))
    if form == "dense":
        values = draw(st.lists(elements, min_size=length * max(width, 1), max_size=length * 3))
        shape = (length, width) if width else ()
        return tensor(values[: length * max(width, 1)], dtype, shape)
    if form == "csr":
        cells = draw(st.lists(st.booleans(), min_size=length * 2, max_size=length * 2))
        filled = np.array(cells, bool).reshape(length, 2)
        values = draw(st.lists(elements, min_size=int(filled.sum()), max_size=int(filled.sum())))
        rows = [0, *np.cumsum(filled.sum(1)).tolist()]
        return csr(values, rows, filled.nonzero()[1].tolist(), (length, 2), dtype)
    shape = tuple(draw(st.lists(SIZES, max_size=3)))
    if form == "any":
        kind = draw(st.integers(0, 4))
        return wire_pb2.Tensor(dense=draw(st.binary(max_size=40)), dtype=kind, shape=shape)
    indices = st.lists(st.integers(-1, 4), max_size=5)
    return csr(draw(st.lists(st.integers(0, 66), max_size=4)), draw(indices), draw(indices), shape)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    data = []
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.lists(st.integers(0, 66), min_size=1, max_size=6))
        one = datum(
            tokens,
            target_tokens=draw(wire_tensors(len(tokens), INT)),
            weights=draw(wire_tensors(len(tokens), draw(st.sampled_from([FLOAT, INT])))),
        )
        if draw(st.booleans()):
            one.loss_fn_inputs["weights"].CopyFrom(tensor([1] * len(tokens), FLOAT))
            one.loss_fn_inputs["target_tokens"].CopyFrom(tensor(tokens))
        data.append(one)
    return request(*data).SerializeToString()


PROPERTY = settings(
    deadline=None,
    max_examples=300,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@PROPERTY
@given(body=requests())
@example(GOOD_REQUESTS["sparse"].SerializeToString())
@example(GOOD_REQUESTS["two targets per position"].SerializeToString())
def test_whatever_passes_can_be_executed(engine: Engine, body: bytes):
    execute_if_admitted(engine, body)


@PROPERTY
@given(
    name=st.sampled_from(sorted(GOOD_REQUESTS)),
    at=st.floats(0, 1),
    removed=st.integers(0, 8),
    inserted=st.binary(max_size=8),
)
def test_a_damaged_request_is_refused_or_executed(
    engine: Engine, name: str, at: float, removed: int, inserted: bytes
):
    body = GOOD_REQUESTS[name].SerializeToString()
    start = int(at * len(body))
    execute_if_admitted(engine, body[:start] + inserted + body[start + removed :])


@PROPERTY
@given(body=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_executed(engine: Engine, body: bytes):
    execute_if_admitted(engine, body)


@pytest.mark.parametrize("name", GOOD_REQUESTS)
def test_every_good_request_can_be_executed(engine: Engine, name: str):
    assert execute_if_admitted(engine, GOOD_REQUESTS[name].SerializeToString())


# --- sampling requests ----------------------------------------------------------------------------


def targets(**changes: Any) -> dict[str, Any]:
    """A request's target_prompt_logprobs with those parts changed."""
    return {"target_prompt_logprobs": {**TARGETS, **changes}}


TARGETS = {"data": [1, -1, 66, 0], "dtype": "int64", "shape": [2, 2]}
SPARSE_TARGETS = {
    "data": [1, 66],
    "dtype": "int64",
    "shape": [2, 5],
    "sparse_crow_indices": [0, 0, 2],
    "sparse_col_indices": [0, 4],
}
LARGE_TARGETS = targets(data=[-1] * 11 * 400_000, shape=[11, 400_000])


def sample(**fields: Any) -> Sample:
    """A good request with those fields changed; a dotted name reaches into sampling_params."""
    params = {"max_tokens": 4, **fields.pop("sampling_params", {})}
    tokens = fields.pop("tokens", [1, 2, 3])
    body = {
        "sampling_session_id": "s",
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": tokens}]},
        "sampling_params": params,
        **fields,
    }
    return check(Sample, body)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"tokens": [66] * 16, "sampling_params": {"max_tokens": 1}},
        {"sampling_params": {"max_tokens": 14}},
        {"sampling_params": {"max_tokens": None}},
        {"num_samples": 8},
        {"sampling_params": {"stop": []}},
        {"sampling_params": {"stop": ["a", "b"]}},
        {"sampling_params": {"stop": [0, 66]}},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 2},
        {"prompt_alt_tokens_k": 100},
        {"target_prompt_logprobs": TARGETS},
        {"target_prompt_logprobs": {**TARGETS, "data": [], "shape": [2, 0]}},
        {"target_prompt_logprobs": SPARSE_TARGETS},
        {"tokens": [1], "target_prompt_logprobs": {**TARGETS, "data": [], "shape": [0, 4]}},
    ],
)
def test_a_good_sampling_request_passes(wanted: dict[str, Any]):
    check_sample(sample(**wanted), LIMITS)


def test_the_top_tokens_of_all_that_a_request_may_sample_are_limited():
    wide = replace(LIMITS, max_context_tokens=10_000)
    check_sample(sample(topk_sample_logprobs=60, num_samples=8), wide)
    for params in ({"max_tokens": None}, {"max_tokens": 9_000}):
        wanted = sample(topk_sample_logprobs=60, num_samples=8, sampling_params=params)
        with pytest.raises(BadRequest, match=r"topk_sample_logprobs: 60.*set max_tokens"):
            check_sample(wanted, wide)


@pytest.mark.parametrize(
    ("wanted", "field", "allowed"),
    [
        ({"tokens": []}, "prompt: empty", "at least one token"),
        ({"tokens": [1, 67]}, "prompt: token id 67 at position 1", "0 to 66"),
        ({"tokens": [-1]}, "prompt: token id -1 at position 0", "0 to 66"),
        ({"tokens": [2**70]}, f"prompt: token id {2**70}", "0 to 66"),
        ({"tokens": [1] * 17}, "prompt: 17 tokens", "context has 16"),
        ({"sampling_params": {"max_tokens": 15}}, "sampling_params.max_tokens: 15", "at most 14"),
        ({"num_samples": 9}, "num_samples: 9", "at most 8"),
        ({"sampling_params": {"stop": [67]}}, "sampling_params.stop: token id 67", "0 to 66"),
        ({"sampling_params": {"stop": ""}}, "sampling_params.stop", "must not be empty"),
        ({"sampling_params": {"stop": ["a", ""]}}, "sampling_params.stop", "must not be empty"),
        ({"prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n", "needs prompt_logprobs"),
        (
            {"prompt_logprobs": True, "prompt_logprobs_last_n": 3},
            "prompt_logprobs_last_n: 3",
            "from 1 to 2",
        ),
        ({"tokens": [1] * 12, **LARGE_TARGETS}, "values for the prompt", f"{MAX_SCORE_CELLS}"),
        (targets(dtype="float32"), "target_prompt_logprobs.dtype", "int64"),
        (targets(data=[1.0] * 4), "target_prompt_logprobs.data", "integers"),
        (targets(data=[2**70] * 4), "target_prompt_logprobs.data", "int64"),
        (targets(data=[1, 2, 3, 67]), "target_prompt_logprobs.data: token id 67", "0 to 66"),
        (targets(data=[1, 2, 3, -2]), "target_prompt_logprobs.data: token id -2", "0 to 66"),
        (targets(data=[1]), "target_prompt_logprobs.data: 1 values", "[2, 2]"),
        (targets(shape=None), "target_prompt_logprobs.shape", "[2, K]"),
        (targets(shape=[3, 2]), "target_prompt_logprobs.shape", "[2, K]"),
        (targets(sparse_crow_indices=[0, 1, 4]), "sparse_col_indices", "integers"),
        (
            {"target_prompt_logprobs": {**SPARSE_TARGETS, "sparse_col_indices": [0, 5]}},
            "target_prompt_logprobs: CSR",
            "[2, 5]",
        ),
        (
            {"target_prompt_logprobs": {**SPARSE_TARGETS, "sparse_crow_indices": [0, 3, 2]}},
            "target_prompt_logprobs: CSR",
            "[2, 5]",
        ),
    ],
)
def test_a_refused_sampling_request_names_the_field_and_what_is_allowed(
    wanted: dict[str, Any], field: str, allowed: str
):
    with pytest.raises(BadRequest) as refused:
        check_sample(sample(**wanted), LIMITS)
    assert re.search(f"{re.escape(field)}.*{re.escape(allowed)}", refused.value.message)
