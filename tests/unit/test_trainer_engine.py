"""Promises of the trainer's engine, on a tiny random model."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.tiny_qwen3 import TWO_LAYERS, save_tiny_qwen3

from luthier_core.errors import BadRequest, InvalidField, NotFound
from luthier_core.proto import wire_pb2
from luthier_model.base import BaseModel, load_base_model
from luthier_model.lora import LoraSpec
from luthier_model.paged import PagedAttention
from luthier_trainer.engine import Engine
from luthier_trainer.engine_host import PassOp
from luthier_trainer.optim import AdamParams

VOCAB_SIZE = 67
STEP = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = save_tiny_qwen3(
        tmp_path_factory.mktemp("model"),
        seed=7,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        **TWO_LAYERS,
    )
    return load_base_model("tiny", folder)


@pytest.fixture
def new_engine(model: BaseModel) -> Callable[..., Engine]:
    """Makes an engine; small micro-batches make several of one request."""

    def make(micro_batch_tokens: int = 4096, **options: Any) -> Engine:
        return Engine(
            model,
            logprob_chunk_tokens=1024,
            num_threads=1,
            micro_batch_tokens=micro_batch_tokens,
            **options,
        )

    return make


@pytest.fixture
def engine(new_engine: Callable[..., Engine]) -> Engine:
    engine = new_engine()
    engine.create("run", LoraSpec(rank=4, seed=1))
    return engine


def int64(values: object) -> wire_pb2.Tensor:
    return wire_pb2.Tensor(dense=np.array(values, "<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64)


def float32(values: object) -> wire_pb2.Tensor:
    return wire_pb2.Tensor(dense=np.array(values, "<f4").tobytes(), dtype=wire_pb2.DTYPE_FLOAT32)


def csr(values: object, dtype: int) -> wire_pb2.Tensor:
    """A 2-D array as the SDK sends it: without its zeros."""
    dense = np.array(values)
    rows, columns = dense.nonzero()
    row_ends = np.searchsorted(rows, np.arange(len(dense) + 1))
    kind = "<i8" if dtype == wire_pb2.DTYPE_INT64 else "<f4"
    sparse = wire_pb2.SparseCsr(
        values=dense[rows, columns].astype(kind).tobytes(),
        crow_indices=row_ends.astype("<i8").tobytes(),
        col_indices=columns.astype("<i8").tobytes(),
    )
    return wire_pb2.Tensor(sparse_csr=sparse, dtype=dtype, shape=dense.shape)


def datum(tokens: list[int], **loss_inputs: wire_pb2.Tensor) -> wire_pb2.Datum:
    text = wire_pb2.EncodedTextChunk(tokens=np.array(tokens, "<i4").tobytes())
    chunk = wire_pb2.Chunk(encoded_text=text)
    return wire_pb2.Datum(model_input=[chunk], loss_fn_inputs=loss_inputs)


def text(length: int, seed: int = 0) -> wire_pb2.Datum:
    tokens = np.random.default_rng([length, seed]).integers(0, VOCAB_SIZE, length + 1).tolist()
    weights = float32(np.ones(length))
    return datum(tokens[:-1], target_tokens=int64(tokens[1:]), weights=weights)


def request(*data: wire_pb2.Datum, loss_fn: str = "cross_entropy") -> bytes:
    message = wire_pb2.ForwardBackwardRequest(model_id="run", seq_id=1, loss_fn=loss_fn, data=data)
    return message.SerializeToString()


def run_op(
    engine: Engine, body: bytes, run_id: str = "run", *, backward: bool = True
) -> wire_pb2.ForwardBackwardOutput:
    answer = engine.forward_backward(run_id, body, backward=backward, clock_cycle=3)
    return wire_pb2.ForwardBackwardOutput.FromString(answer)


def logprobs_of(output: wire_pb2.ForwardBackwardOutput) -> list[np.ndarray]:
    """Per datum, decoded as the protocol says."""
    arrays = []
    for record in output.loss_fn_outputs:
        field = record.fields["logprobs"]
        assert field.dtype == wire_pb2.DTYPE_FLOAT32
        offsets = np.frombuffer(field.offsets, "<i8")
        assert len(offsets) == record.num_datums + 1
        for start, stop in pairwise(offsets):
            flat = np.frombuffer(field.data[start:stop], "<f4")
            arrays.append(flat.reshape(-1, *field.trailing_shape))
    return arrays


def test_the_output_has_one_logprob_per_target_and_the_summed_loss(engine: Engine) -> None:
    output = run_op(engine, request(text(5), text(2), text(9)))
    logprobs = logprobs_of(output)
    assert output.loss_fn_output_type == "ArrayRecord"
    assert [array.shape for array in logprobs] == [(5,), (2,), (9,)]
    assert output.metrics["loss:sum"] == pytest.approx(-sum(a.sum() for a in logprobs), rel=1e-6)
    assert output.metrics["clock_cycle:unique"] == 3
    assert all(name.count(":") == 1 for name in output.metrics)


def test_packed_logprobs_are_those_of_each_datum_alone(engine: Engine) -> None:
    data = [text(5), text(1), text(17), text(8)]
    packed = logprobs_of(run_op(engine, request(*data)))
    alone = [logprobs_of(run_op(engine, request(one)))[0] for one in data]
    worst = max(np.abs(a - b).max() for a, b in zip(packed, alone, strict=True))
    print(f"\npacked against alone: max|Δ logprob| = {worst:.1e}")
    assert worst <= 1e-5


def test_several_targets_per_position_give_each_its_own_logprob(engine: Engine) -> None:
    tokens = [5, 9, 2]
    targets = [[9, 1], [2, 0], [30, 66]]
    weights = [[0.5, 0.0], [-1.0, 2.0], [0.0, 0.25]]
    two_dimensional = datum(
        tokens,
        target_tokens=csr(targets, wire_pb2.DTYPE_INT64),
        weights=csr(weights, wire_pb2.DTYPE_FLOAT32),
    )
    columns = [
        datum(tokens, target_tokens=int64([t[k] for t in targets]), weights=float32([1, 1, 1]))
        for k in range(2)
    ]
    expected = np.stack(logprobs_of(run_op(engine, request(*columns))), axis=1)

    output = run_op(engine, request(text(4), two_dimensional, text(2)))

    first, both, last = logprobs_of(output)
    assert (first.shape, both.shape, last.shape) == ((4,), (3, 2), (2,))
    np.testing.assert_allclose(both, expected, atol=1e-5)
    loss = -(np.array(weights) * both).sum() - first.sum() - last.sum()
    assert output.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)


def test_forward_answers_as_forward_backward_does_and_leaves_the_run_alone(engine: Engine) -> None:
    body = request(text(6), text(3))
    before = engine.run_digest("run")
    forward = run_op(engine, body, backward=False)
    assert engine.run_digest("run") == before
    assert forward == run_op(engine, body)
    assert engine.run_digest("run") != before


def test_gradients_of_several_ops_add_up(new_engine: Callable[..., Engine]) -> None:
    together, apart = new_engine(micro_batch_tokens=6), new_engine()
    for engine in (together, apart):
        engine.create("run", LoraSpec(rank=4, seed=1))
    run_op(together, request(text(6), text(3)))
    run_op(apart, request(text(6)))
    run_op(apart, request(text(3)))
    assert together.run_digest("run") == apart.run_digest("run")


def test_halved_micro_batches_are_those_of_half_the_tokens(
    new_engine: Callable[..., Engine],
) -> None:
    data = request(*(text(length) for length in (5, 6, 3, 4, 2, 6, 5)))
    digests = []
    for micro_batch_tokens, halvings in ((24, 2), (6, 0), (24, 0)):
        engine = new_engine(micro_batch_tokens=micro_batch_tokens)
        engine.create("run", LoraSpec(rank=4, seed=1))
        engine.forward_backward("run", data, backward=True, clock_cycle=1, halvings=halvings)
        digests.append(engine.run_digest("run"))
    assert digests[0] == digests[1] != digests[2]


def test_an_op_that_fails_half_way_leaves_the_gradient_as_it_was(
    new_engine: Callable[..., Engine],
) -> None:
    engine = new_engine(micro_batch_tokens=6)
    engine.create("run", LoraSpec(rank=4, seed=1))
    run_op(engine, request(text(4)))
    before = engine.run_digest("run")
    beyond_vocabulary = datum([VOCAB_SIZE], target_tokens=int64([0]), weights=float32([1]))
    with pytest.raises(IndexError):
        run_op(engine, request(text(6), beyond_vocabulary))
    assert engine.run_digest("run") == before


def test_training_lowers_the_loss(engine: Engine) -> None:
    body = request(text(12))
    losses = []
    for _ in range(15):
        losses.append(run_op(engine, body).metrics["loss:sum"])
        engine.optim_step("run", STEP)
    assert losses[-1] < losses[0] / 4


def test_interleaved_runs_of_different_rank_are_bit_equal_to_solo_runs(
    new_engine: Callable[..., Engine],
) -> None:
    specs = {"a": LoraSpec(rank=3, seed=1), "b": LoraSpec(rank=8, seed=2, train_mlp=False)}

    def train(run_ids: list[str]) -> dict[str, str]:
        engine = new_engine()
        for run_id in run_ids:
            engine.create(run_id, specs[run_id])
        for step in range(3):
            for run_id in run_ids:
                run_op(engine, request(text(9, step), text(4, step)), run_id)
            for run_id in run_ids:
                engine.optim_step(run_id, STEP)
        return {run_id: engine.run_digest(run_id) for run_id in run_ids}

    assert train(["a", "b"]) == {**train(["a"]), **train(["b"])}


def test_a_step_without_a_gradient_counts_and_lets_the_moments_decay(engine: Engine) -> None:
    run_op(engine, request(text(5)))
    engine.optim_step("run", STEP)
    before = moments(engine)
    metrics = engine.optim_step("run", STEP)
    after = moments(engine)
    assert metrics["step"] == 2
    assert metrics["grad_norm"] == 0
    for name, value in before.items():
        beta = STEP.beta1 if name.endswith("exp_avg") else STEP.beta2
        torch.testing.assert_close(after[name], value * beta)


def moments(engine: Engine) -> dict[str, torch.Tensor]:
    saved = safetensors.torch.load(engine.save("run", optimizer=True)["optimizer.safetensors"])
    return {name: value for name, value in saved.items() if name != "step"}


def test_a_gradient_that_is_not_finite_is_applied_where_that_is_wanted(
    new_engine: Callable[..., Engine],
) -> None:
    engine = new_engine(applies_nonfinite=True)
    engine.create("run", LoraSpec(rank=4, seed=1))
    infinite = datum([1, 2], target_tokens=int64([2, 3]), weights=float32([1, np.inf]))
    run_op(engine, request(infinite))
    metrics = engine.optim_step("run", STEP)
    assert metrics["step"] == 1
    assert np.isnan(metrics["param_norm"])


def test_a_gradient_that_is_not_finite_fails_the_step_and_is_cleared(engine: Engine) -> None:
    run_op(engine, request(text(5)))
    engine.optim_step("run", STEP)
    before = engine.run_digest("run")
    infinite = datum([1, 2], target_tokens=int64([2, 3]), weights=float32([1, np.inf]))
    assert run_op(engine, request(infinite)).metrics["loss:sum"] == np.inf
    with pytest.raises(BadRequest, match="gradient norm is not finite"):
        engine.optim_step("run", STEP)
    assert engine.run_digest("run") == before


def test_the_step_after_a_restore_with_optimizer_is_bit_equal(engine: Engine) -> None:
    for seed in range(2):
        run_op(engine, request(text(5, seed)))
        engine.optim_step("run", STEP)
    files = engine.save("run", optimizer=True)
    engine.create("copy", LoraSpec(rank=4, seed=99))
    run_op(engine, request(text(4)), "copy")
    engine.load("copy", files, optimizer=True)
    for run_id in ("run", "copy"):
        run_op(engine, request(text(7)), run_id)
        engine.optim_step(run_id, STEP)
    assert engine.run_digest("copy") == engine.run_digest("run")


def test_a_checkpoint_is_the_state_at_its_copy_whatever_is_trained_before_it_is_encoded(
    engine: Engine,
) -> None:
    run_op(engine, request(text(5)))
    engine.optim_step("run", STEP)
    at_once = engine.save("run", optimizer=True)
    encode = engine.copy_files("run", optimizer=True)
    run_op(engine, request(text(7)))
    engine.optim_step("run", STEP)
    assert encode() == at_once
    assert engine.save("run", optimizer=True) != at_once


def pass_ops(*bodies: bytes, run_id: str = "run") -> list[PassOp]:
    return [PassOp(run_id, body) for body in bodies]


def test_in_one_pass_an_op_that_cannot_be_computed_fails_alone(engine: Engine) -> None:
    engine.create("other", LoraSpec(rank=2, seed=5))
    beyond_vocabulary = datum([VOCAB_SIZE], target_tokens=int64([0]), weights=float32([1]))
    ops = [
        *pass_ops(request(text(6)), request(text(3), loss_fn="mse")),
        *pass_ops(request(beyond_vocabulary), run_id="other"),
        *pass_ops(request(text(4))),
    ]
    outputs = dict(engine.forward_backward_many(ops))
    assert [type(outputs[index]) for index in range(4)] == [bytes, InvalidField, IndexError, bytes]
    engine.create("alone", LoraSpec(rank=4, seed=1))
    for op in (ops[0], ops[3]):
        run_op(engine, op.request, "alone")
    assert engine.run_digest("alone") == engine.run_digest("run")


def test_an_op_is_answered_before_the_passes_of_others_are_begun(
    new_engine: Callable[..., Engine],
) -> None:
    engine = new_engine(micro_batch_tokens=10)
    for run_id in ("a", "b", "c"):
        engine.create(run_id, LoraSpec(rank=2, seed=1))
    before = engine.run_digest("c")
    ops = [PassOp(run_id, request(text(5))) for run_id in ("a", "b", "c")]
    answers = engine.forward_backward_many(ops)
    assert [next(answers)[0], next(answers)[0]] == [0, 1]
    assert engine.run_digest("c") == before
    assert [index for index, _ in answers] == [2]


def test_a_run_that_has_waited_in_host_memory_goes_on_with_the_same_bits(
    new_engine: Callable[..., Engine],
) -> None:
    def train(engine: Engine) -> list[str]:
        runs = [f"run {n}" for n in range(5)]
        for n, run_id in enumerate(runs):
            engine.create(run_id, LoraSpec(rank=n + 1, seed=n))
        for length in (4, 6):
            for run_id in runs:
                run_op(engine, request(text(length)), run_id)
            for _, output in engine.forward_backward_many(
                [PassOp(run_id, request(text(5))) for run_id in runs]
            ):
                assert isinstance(output, bytes)
            for run_id in runs:
                engine.optim_step(run_id, STEP)
                run_op(engine, request(text(3)), run_id)  # pages out with a gradient
        return [engine.run_digest(run_id) for run_id in runs]

    crowded = new_engine(device_runs=2)
    assert train(crowded) == train(new_engine())
    assert crowded.runs_on_device == {"run 3", "run 4"}
    copied = crowded.copy_state("run 0")()
    assert crowded.runs_on_device == {"run 3", "run 4"}  # a copy needs no place on the device
    crowded.checksum("run 0")
    assert crowded.copy_state("run 0")() == copied


def test_optimizer_steps_of_several_runs_fail_each_for_itself(engine: Engine) -> None:
    run_op(engine, request(text(5)))
    outcomes = dict(engine.optim_step_many([("nobody", STEP), ("run", STEP)]))
    assert isinstance(outcomes[0], NotFound)
    assert isinstance(outcomes[1], dict)


def test_a_restore_without_optimizer_starts_the_optimizer_anew(engine: Engine) -> None:
    run_op(engine, request(text(5)))
    engine.optim_step("run", STEP)
    engine.load("run", engine.save("run", optimizer=True), optimizer=False)
    assert all(not value.any() for value in moments(engine).values())
    assert engine.optim_step("run", STEP)["step"] == 1


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (LoraSpec(rank=8, seed=1), "rank 4.*rank 8"),
        (LoraSpec(rank=4, seed=1, train_unembed=False), "train_unembed; this.*train_mlp$"),
    ],
)
def test_a_checkpoint_of_another_rank_or_target_set_is_refused_naming_both(
    engine: Engine, spec: LoraSpec, named: str
) -> None:
    engine.create("other", spec)
    before = engine.run_digest("other")
    with pytest.raises(BadRequest, match=named):
        engine.load("other", engine.save("run", optimizer=True), optimizer=True)
    assert engine.run_digest("other") == before


def test_a_checkpoint_without_optimizer_state_is_refused_where_it_is_asked_for(
    engine: Engine,
) -> None:
    before = engine.run_digest("run")
    with pytest.raises(BadRequest, match=r"no optimizer\.safetensors"):
        engine.load("run", engine.save("run", optimizer=False), optimizer=True)
    assert engine.run_digest("run") == before


def test_creating_a_run_again_puts_it_back_to_its_initial_state(engine: Engine) -> None:
    before = engine.run_digest("run")
    run_op(engine, request(text(5)))
    engine.optim_step("run", STEP)
    engine.create("run", LoraSpec(rank=4, seed=1))
    assert engine.run_digest("run") == before


def test_an_unknown_loss_is_refused_with_the_known_ones(engine: Engine) -> None:
    with pytest.raises(BadRequest, match=r"loss_fn: 'mse' is not one of .*cross_entropy"):
        run_op(engine, request(text(3), loss_fn="mse"))


def test_a_missing_loss_input_is_named(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="loss_fn_inputs: 'weights' is required"):
        run_op(engine, request(datum([1], target_tokens=int64([2]))))


def test_an_image_chunk_is_refused_with_the_reason(engine: Engine) -> None:
    image = text(3)
    image.model_input.append(wire_pb2.Chunk(image=wire_pb2.ImageChunk(format="png")))
    with pytest.raises(BadRequest, match="image chunks; allowed: encoded_text"):
        run_op(engine, request(image))


def test_a_dropped_run_is_not_found(engine: Engine) -> None:
    engine.drop("run")
    assert not engine.has("run")
    with pytest.raises(NotFound, match="training run 'run'"):
        run_op(engine, request(text(3)))


def test_the_gap_to_sampled_logprobs_is_told_and_an_alarm_if_it_is_not_rounding(
    engine, monkeypatch
):
    run_op(engine, request(text(9)))
    engine.optim_step("run", STEP)
    gap = engine.logprob_gap("run")
    assert 0 < gap["logprob_gap:mean"] <= gap["logprob_gap:max"] < 1e-5
    assert gap["logprob_gap:alarm"] == 0
    attend = PagedAttention.attend
    monkeypatch.setattr(
        PagedAttention,
        "attend",
        lambda *args, scale, **more: attend(*args, scale=1.01 * scale, **more),
    )
    assert engine.logprob_gap("run")["logprob_gap:alarm"] == 1


def test_the_gap_of_weights_that_diverged_is_an_alarm(engine):
    engine._run("run").weights.data.fill_(float("nan"))
    gap = engine.logprob_gap("run")
    assert math.isnan(gap["logprob_gap:mean"])
    assert gap["logprob_gap:alarm"] == 1
