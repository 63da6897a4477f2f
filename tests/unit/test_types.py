"""Requests as every SDK release writes them, the protocol's defaults, and errors one can act on."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier_core.errors import InvalidField, LuthierError, Unreadable, Unsupported
from luthier_core.types import (
    AdamParams,
    CreateModel,
    CreateSamplingSession,
    CreateSession,
    FinishSession,
    LoadWeights,
    LoraConfig,
    ModelId,
    OptimStep,
    RetrieveFuture,
    Sample,
    SamplingParams,
    SaveWeights,
    SaveWeightsForSampler,
    SessionHeartbeat,
    TinkerPath,
    WireModel,
    check,
    parse,
)

SHORTEST: dict[type[WireModel], dict[str, Any]] = {
    CreateSession: {},
    SessionHeartbeat: {"session_id": "s"},
    FinishSession: {"reason": {"type": "success"}},
    CreateModel: {"session_id": "s", "model_seq_id": 0, "base_model": "m"},
    ModelId: {"model_id": "s:train:0"},
    OptimStep: {"model_id": "s:train:0", "seq_id": 2},
    SaveWeights: {"model_id": "s:train:0", "seq_id": 3, "path": "x"},
    SaveWeightsForSampler: {"model_id": "s:train:0", "seq_id": 3, "sampling_session_seq_id": 0},
    LoadWeights: {"model_id": "s:train:0", "seq_id": 1, "path": "tinker://a/weights/x"},
    TinkerPath: {"tinker_path": "tinker://a/weights/x"},
    CreateSamplingSession: {"session_id": "s", "sampling_session_seq_id": 0, "base_model": "m"},
    Sample: {
        "sampling_session_id": "s:sample:0",
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
    },
    RetrieveFuture: {"request_id": "s:train:0:1"},
}
"""The shortest request of each kind: what must be there and nothing else."""

MODELS = list(SHORTEST)

# As recorded from the releases named (wire protocol 11.1, 11.2). The first sends only what is set,
# with nulls; the second sends types and defaults.
TWO_STYLES: dict[str, tuple[type[WireModel], dict[str, Any], dict[str, Any]]] = {
    "create_session": (
        CreateSession,
        {"tags": [], "user_metadata": {"exp": "x"}, "sdk_version": "0.38.0", "project_id": None},
        {
            "tags": [],
            "user_metadata": {"exp": "x"},
            "sdk_version": "0.38.0",
            "type": "create_session",
        },
    ),
    "create_model": (
        CreateModel,
        {
            "session_id": "s",
            "model_seq_id": 0,
            "base_model": "m",
            "user_metadata": None,
            "lora_config": {"rank": 32, "seed": None},
        },
        {
            "session_id": "s",
            "model_seq_id": 0,
            "base_model": "m",
            "lora_config": {
                "rank": 32,
                "train_unembed": True,
                "train_mlp": True,
                "train_attn": True,
            },
            "optimizer_config": {"type": "adamw"},
            "type": "create_model",
        },
    ),
    "optim_step": (
        OptimStep,
        {"adam_params": {"learning_rate": 0.0001}, "model_id": "s:train:0", "seq_id": 2},
        {
            "model_id": "s:train:0",
            "seq_id": 2,
            "type": "optim_step",
            "adam_params": {
                "learning_rate": 0.0001,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-12,
                "weight_decay": 0.0,
                "grad_clip_norm": 0.0,
            },
        },
    ),
    "save_weights": (
        SaveWeights,
        {"model_id": "s:train:0", "seq_id": 3, "path": "x", "ttl_seconds": None},
        {
            "model_id": "s:train:0",
            "seq_id": 3,
            "path": "x",
            "overwrite": False,
            "type": "save_weights",
        },
    ),
    "save_weights_for_sampler": (
        SaveWeightsForSampler,
        {"model_id": "s:train:0", "sampling_session_seq_id": 0, "seq_id": 3},
        {
            "model_id": "s:train:0",
            "sampling_session_seq_id": 0,
            "kind": "snapshot",
            "seq_id": 3,
            "type": "save_weights_for_sampler",
        },
    ),
    "asample": (
        Sample,
        {
            "num_samples": 1,
            "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
            "sampling_params": {"max_tokens": 8, "stop": ["\n"], "temperature": 0.7, "seed": None},
            "sampling_session_id": "s:sample:0",
            "seq_id": 0,
            "prompt_logprobs": None,
            "topk_prompt_logprobs": 0,
        },
        {
            "num_samples": 1,
            "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
            "sampling_params": {
                "max_tokens": 8,
                "stop": ["\n"],
                "temperature": 0.7,
                "top_k": -1,
                "top_p": 1.0,
            },
            "sampling_session_id": "s:sample:0",
            "seq_id": 0,
            "prompt_logprobs": False,
            "topk_prompt_logprobs": 0,
            "topk_sample_logprobs": 0,
            "prompt_alt_tokens_k": 0,
            "record_stability_info": False,
            "type": "sample",
        },
    ),
}


@pytest.mark.parametrize("endpoint", TWO_STYLES)
def test_the_styles_of_old_and_new_releases_mean_the_same(endpoint: str):
    model, terse, explicit = TWO_STYLES[endpoint]
    assert check(model, terse) == check(model, explicit)


@pytest.mark.parametrize("model", MODELS)
def test_null_is_the_same_as_absent(model: type[WireModel]):
    optional = model.model_fields.keys() - SHORTEST[model].keys()
    with_nulls = {**SHORTEST[model], **dict.fromkeys(optional)}
    assert check(model, with_nulls) == check(model, SHORTEST[model])


@pytest.mark.parametrize("model", MODELS)
def test_what_a_newer_client_sends_is_ignored(model: type[WireModel]):
    newer = {**SHORTEST[model], "type": "newer", "no_such_field": [1, {"a": None}]}
    assert check(model, newer) == check(model, SHORTEST[model])


@pytest.mark.parametrize("model", [m for m in MODELS if SHORTEST[m] and m is not LoadWeights])
def test_a_required_field_that_is_missing_is_named(model: type[WireModel]):
    for name in SHORTEST[model]:
        if model.model_fields[name].is_required():
            without = {key: value for key, value in SHORTEST[model].items() if key != name}
            with pytest.raises(InvalidField, match=f"{name}: Field required"):
                check(model, without)


@pytest.mark.parametrize("model", MODELS)
def test_canonical_bytes_are_the_same_request(model: type[WireModel]):
    request = check(model, SHORTEST[model])
    assert parse(model, request.to_json()) == request
    reordered = dict(reversed(SHORTEST[model].items()))
    assert check(model, reordered).to_json() == request.to_json()


# --- the protocol's defaults ----------------------------------------------------------------------


def test_defaults_of_adam_are_the_protocols():
    assert AdamParams().model_dump() == {
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-12,
        "weight_decay": 0.0,
        "grad_clip_norm": 0.0,
    }
    assert OptimStep(model_id="s:train:0", seq_id=1).adam_params == AdamParams()


def test_defaults_of_sampling_are_the_protocols():
    assert SamplingParams().model_dump() == {
        "max_tokens": None,
        "seed": None,
        "stop": None,
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    request = check(Sample, SHORTEST[Sample])
    assert request.num_samples == 1
    assert request.prompt_logprobs is False
    assert request.topk_prompt_logprobs == request.topk_sample_logprobs == 0


def test_defaults_of_lora_train_everything_with_a_seed_of_the_servers_choice():
    assert LoraConfig(rank=8).model_dump() == {
        "rank": 8,
        "seed": None,
        "train_unembed": True,
        "train_mlp": True,
        "train_attn": True,
    }


def test_a_save_keeps_for_ever_and_does_not_overwrite():
    save = check(SaveWeights, SHORTEST[SaveWeights])
    assert (save.ttl_seconds, save.overwrite, save.user_metadata) == (None, False, {})


@pytest.mark.parametrize(
    ("stop", "parsed"),
    [
        (None, None),
        ([], []),
        ("\n", "\n"),
        (["a", "b"], ["a", "b"]),
        ([7, 8], [7, 8]),
    ],
)
def test_stop_keeps_its_five_meanings_apart(stop: Any, parsed: Any):
    params = check(SamplingParams, {"stop": stop})
    assert params.stop == parsed
    assert type(params.stop) is type(parsed)
    assert parse(SamplingParams, params.to_json()).stop == parsed


def test_a_sampling_seq_id_may_have_63_bits():
    request = check(Sample, {**SHORTEST[Sample], "seq_id": 2**63 - 1})
    assert json.loads(request.to_json())["seq_id"] == 2**63 - 1


# --- errors ---------------------------------------------------------------------------------------

WRONG: dict[str, tuple[type[WireModel], dict[str, Any], list[str]]] = {
    "rank 0": (
        CreateModel,
        {"lora_config": {"rank": 0}},
        ["lora_config.rank", "greater than or equal to 1", "got 0"],
    ),
    "nothing to train": (
        CreateModel,
        {"lora_config": {"rank": 1, "train_unembed": 0, "train_mlp": 0, "train_attn": 0}},
        ["lora_config", "train_unembed, train_mlp, train_attn must be true"],
    ),
    "model_seq_id below 0": (
        CreateModel,
        {"model_seq_id": -1},
        ["model_seq_id", "greater than or equal to 0", "got -1"],
    ),
    "a number for a name": (CreateModel, {"base_model": 8}, ["base_model", "string", "got 8"]),
    "an optimizer that there is not": (
        CreateModel,
        {"optimizer_config": {"type": "sgd"}},
        ["optimizer_config.type", "'adamw' or 'dimuon'", "got 'sgd'"],
    ),
    "seq_id 0": (OptimStep, {"seq_id": 0}, ["seq_id", "greater than or equal to 1", "got 0"]),
    "seq_id beyond int32": (
        OptimStep,
        {"seq_id": 2**31},
        ["seq_id", "less than 2147483648", "got 2147483648"],
    ),
    "negative learning rate": (
        OptimStep,
        {"adam_params": {"learning_rate": -0.1}},
        ["adam_params.learning_rate", "greater than or equal to 0", "got -0.1"],
    ),
    "beta of 1": (
        OptimStep,
        {"adam_params": {"beta2": 1}},
        ["adam_params.beta2", "less than 1", "got 1"],
    ),
    "infinite weight decay": (
        OptimStep,
        {"adam_params": {"weight_decay": float("inf")}},
        ["adam_params.weight_decay", "finite", "got inf"],
    ),
    "two wrong fields": (
        OptimStep,
        {"adam_params": {"eps": -1, "beta1": "x"}},
        ["adam_params.eps", "adam_params.beta1", "got 'x'"],
    ),
    "a name with a slash": (SaveWeights, {"path": "a/b"}, ["path", "pattern", "got 'a/b'"]),
    "a name that is too long": (SaveWeights, {"path": "a" * 129}, ["path", "pattern"]),
    "ttl of a minute": (
        SaveWeights,
        {"ttl_seconds": 60},
        ["ttl_seconds", "greater than or equal to 3600", "got 60"],
    ),
    "neither name nor session": (
        SaveWeightsForSampler,
        {"sampling_session_seq_id": None},
        ["path or sampling_session_seq_id is required"],
    ),
    "kind": (
        SaveWeightsForSampler,
        {"kind": "moving"},
        ["kind", "'snapshot' or 'inflight'", "got 'moving'"],
    ),
    "both a run and a session": (
        LoadWeights,
        {"session_id": "s", "model_seq_id": 0},
        ["model_id and seq_id, or session_id and model_seq_id"],
    ),
    "neither a run nor a session": (
        LoadWeights,
        {"model_id": None},
        ["model_id and seq_id, or session_id and model_seq_id"],
    ),
    "no weights to sample from": (
        CreateSamplingSession,
        {"base_model": None},
        ["base_model or model_path is required"],
    ),
    "reason": (
        FinishSession,
        {"reason": {"type": "bored"}},
        ["reason.type", "'success', 'errored' or 'interrupted'", "got 'bored'"],
    ),
    "prompt with ids that are no numbers": (
        Sample,
        {"prompt": {"chunks": [{"tokens": ["a"]}]}},
        ["prompt.chunks.0.tokens.0", "integer", "got 'a'"],
    ),
    "prompt without chunks": (Sample, {"prompt": {}}, ["prompt.chunks: Field required"]),
    "chunks that are no list": (Sample, {"prompt": {"chunks": 5}}, ["prompt.chunks", "list"]),
    "an image": (
        Sample,
        {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
        ["prompt", "chunk of type 'image'", "use encoded_text"],
    ),
    "an image without its type": (
        Sample,
        {"prompt": {"chunks": [{"data": "", "format": "png"}]}},
        ["prompt", "chunk of type 'image'", "use encoded_text"],
    ),
    "max_tokens 0": (
        Sample,
        {"sampling_params": {"max_tokens": 0}},
        ["sampling_params.max_tokens", "greater than or equal to 1", "got 0"],
    ),
    "temperature below 0": (
        Sample,
        {"sampling_params": {"temperature": -1}},
        ["sampling_params.temperature", "greater than or equal to 0", "got -1"],
    ),
    "top_p of 0": (
        Sample,
        {"sampling_params": {"top_p": 0}},
        ["sampling_params.top_p", "greater than 0", "got 0"],
    ),
    "top_k below -1": (
        Sample,
        {"sampling_params": {"top_k": -2}},
        ["sampling_params.top_k", "greater than or equal to -1", "got -2"],
    ),
    "stop of both sorts": (
        Sample,
        {"sampling_params": {"stop": ["a", 1]}},
        ["sampling_params.stop", "string", "integer"],
    ),
    "num_samples 0": (
        Sample,
        {"num_samples": 0},
        ["num_samples", "greater than or equal to 1", "got 0"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_field_what_is_allowed_and_what_came(name: str):
    model, changes, said = WRONG[name]
    with pytest.raises(InvalidField) as refused:
        check(model, {**SHORTEST[model], **changes})
    for words in said:
        assert words in refused.value.message


def test_an_error_quotes_no_more_than_a_line_of_what_came():
    with pytest.raises(InvalidField) as refused:
        check(SaveWeights, {**SHORTEST[SaveWeights], "path": "x" * 100_000})
    assert len(refused.value.message) < 500


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b"[]", b'"text"', b"null", b"\xff\xfe", b'{"a": NaN}']
)
def test_a_body_that_is_no_json_object_is_unreadable(body: bytes):
    with pytest.raises(Unreadable, match="JSON"):
        parse(ModelId, body)


@pytest.mark.parametrize(
    ("model", "changes", "field", "instead"),
    [
        (CreateModel, {"optimizer_config": {"type": "dimuon"}}, "optimizer_config.type", "adamw"),
        (LoadWeights, {"optimizer_config": {"type": "dimuon"}}, "optimizer_config.type", "adamw"),
        (OptimStep, {"optimizer_params": {"type": "dimuon"}}, "optimizer_params", "adam_params"),
    ],
)
def test_what_is_known_and_not_supported_is_refused_and_never_ignored(
    model: type[WireModel], changes: dict[str, Any], field: str, instead: str
):
    request = check(model, {**SHORTEST[model], **changes})
    with pytest.raises(Unsupported, match=f"{field}.*{instead}"):
        request.refuse_unsupported()


@pytest.mark.parametrize("model", MODELS)
def test_an_ordinary_request_asks_for_nothing_unsupported(model: type[WireModel]):
    check(model, SHORTEST[model]).refuse_unsupported()


@pytest.mark.parametrize("endpoint", TWO_STYLES)
def test_the_defaults_that_a_client_sends_ask_for_nothing_unsupported(endpoint: str):
    model, _, explicit = TWO_STYLES[endpoint]
    check(model, explicit).refuse_unsupported()


# --- anything at all ------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=5),
)
INNER_NAMES = ["type", "chunks", "tokens", "rank", "stop", "max_tokens", "learning_rate"]
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(INNER_NAMES), inner, max_size=3),
    ),
    max_leaves=6,
)
OBJECTS = st.one_of(
    st.dictionaries(st.sampled_from(INNER_NAMES), VALUES, max_size=3),
    st.fixed_dictionaries({"chunks": VALUES}),
)


@st.composite
def almost_requests(draw: st.DrawFn) -> tuple[type[WireModel], bytes]:
    """A good request with a few of its fields replaced by anything."""
    model = draw(st.sampled_from(MODELS))
    names = st.sampled_from(sorted(model.model_fields))
    changes = draw(st.dictionaries(names, st.one_of(VALUES, OBJECTS), max_size=3))
    return model, json.dumps({**SHORTEST[model], **changes}).encode()


@settings(deadline=None, max_examples=500, derandomize=True)
@given(almost_requests())
def test_whatever_is_in_the_fields_a_request_is_taken_or_refused(
    case: tuple[type[WireModel], bytes],
):
    model, body = case
    try:
        request = parse(model, body)
    except LuthierError as error:
        assert error.status in (400, 422)  # noqa: PT017
        return
    assert parse(model, request.to_json()) == request


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.sampled_from(MODELS), st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_and_nothing_else(model: type[WireModel], body: bytes):
    try:
        parse(model, body)
    except LuthierError as error:
        assert error.status in (400, 422)  # noqa: PT017
