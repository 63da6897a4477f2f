"""Requests for forward_backward that lie about their tensors (reliability S5)."""

import random
from typing import Any

import numpy as np
from tests.contract.gateway_client import datum, float32, int64
from tests.malicious.harness import Family, Guard

from luthier_core import losses as core_losses
from luthier_core import validation
from luthier_core.losses import LOSSES
from luthier_core.proto import wire_pb2 as wire
from luthier_core.validation import ModelLimits

VOCAB_SIZE, CONTEXT = 100, 32
LIMITS = ModelLimits(
    vocab_size=VOCAB_SIZE,
    max_context_tokens=CONTEXT,
    max_datums=8,
    max_tokens_per_request=64,
    max_num_samples=4,
)
WRONG_IDS = (-1, VOCAB_SIZE, VOCAB_SIZE + 1, 2**31 - 1, -(2**31))
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def request(*data: wire.Datum, loss: str = "cross_entropy", **config: float) -> bytes:
    message = wire.ForwardBackwardRequest(
        model_id="m", seq_id=1, data=data, loss_fn=loss, loss_fn_config=config
    )
    return message.SerializeToString()


def check(body: bytes) -> object:
    return validation.check_forward_backward(validation.parse_forward_backward(body), LIMITS)


def good() -> bytes:
    return request(datum([1, 2, 3]))


def _at_random(rng: random.Random, values: list[Any], wrong: Any) -> list[Any]:
    values[rng.randrange(len(values))] = wrong
    return values


def prompt_ids(rng: random.Random) -> bytes:
    return request(datum(_at_random(rng, [1, 2, 3], rng.choice(WRONG_IDS))))


def target_ids(rng: random.Random) -> bytes:
    ids = _at_random(rng, [1, 2, 3], rng.choice([*WRONG_IDS, 2**62]))
    return request(datum([1, 2, 3], target_tokens=int64(ids)))


def no_numbers(rng: random.Random) -> bytes:
    values = _at_random(rng, [1.0] * 3, rng.choice(NOT_FINITE))
    return request(datum([1, 2, 3], weights=float32(values)))


def sizes(rng: random.Random) -> bytes:
    num = rng.choice([n for n in range(40) if n != 3])
    return request(datum([1, 2, 3], weights=float32([1.0] * num)))


def torn_bytes(rng: random.Random) -> bytes:
    tensor = wire.Tensor(dense=rng.randbytes(4 * rng.randrange(9) + 1), dtype=wire.DTYPE_FLOAT32)
    return request(datum([1, 2, 3], weights=tensor))


def dtypes(rng: random.Random) -> bytes:
    tensor = wire.Tensor(dense=bytes(12), dtype=rng.choice([0, 3, 7, 99]))
    return request(datum([1, 2, 3], weights=tensor))


def shapes(rng: random.Random) -> bytes:
    shape = rng.choice([[4], [-3], [3, 0], [0], [3, 3], [1, 3], [2**62, 4], [2**32] * 2, [3] * 40])
    tensor = wire.Tensor(dense=bytes(12), dtype=wire.DTYPE_FLOAT32, shape=shape)
    return request(datum([1, 2, 3], weights=tensor))


def csr(rng: random.Random) -> bytes:
    rows, columns = [0, 1, 2, 3], [0, 1, 0]
    which = rng.randrange(5)
    if which == 0:
        columns[rng.randrange(3)] = rng.choice([-1, 2, 2**40, -(2**63)])
    elif which == 1:
        rows[rng.randrange(1, 4)] = rng.choice([-1, 9, 2**40])
    elif which == 2:
        rows = [0, 2, 1, 3]
    elif which == 3:
        rows = rows[: rng.randrange(4)]
    else:
        columns = columns * rng.choice([0, 2])
    sparse = wire.SparseCsr(
        values=float32([1] * 3).dense,
        crow_indices=int64(rows).dense,
        col_indices=int64(columns).dense,
    )
    tokens = wire.Tensor(dense=int64(range(6)).dense, dtype=wire.DTYPE_INT64, shape=[3, 2])
    weights = wire.Tensor(sparse_csr=sparse, dtype=wire.DTYPE_FLOAT32, shape=[3, 2])
    return request(datum([1, 2, 3], weights=weights, target_tokens=tokens))


def losses(rng: random.Random) -> bytes:
    name = rng.choice(["", "x", "custom", "stable_reinforce", "__class__", "CROSS_ENTROPY", "é"])
    return request(datum([1, 2, 3]), loss=name)


def settings(rng: random.Random) -> bytes:
    name = rng.choice(["clip_low_threshold", "clip_high_threshold"])
    value = rng.choice([*NOT_FINITE, -rng.random()])
    inputs = {"logprobs": float32([0.0] * 3), "advantages": float32([1.0] * 3), "weights": None}
    return request(datum([1, 2, 3], **inputs), loss="ppo", **{name: value})


def missing(rng: random.Random) -> bytes:
    wrong = datum([1, 2, 3])
    del wrong.loss_fn_inputs[rng.choice(["target_tokens", "weights"])]
    return request(wrong)


def too_many(rng: random.Random) -> bytes:
    return request(*[datum([1])] * rng.randrange(9, 60))


def too_long(rng: random.Random) -> bytes:
    return request(datum([1] * rng.randrange(CONTEXT + 1, 4 * CONTEXT)))


def no_tokens(rng: random.Random) -> bytes:
    wrong = datum([1, 2, 3])
    text = wrong.model_input[0].encoded_text
    text.tokens = rng.choice([b"", b"\x01", np.array([1, 2], "<i4").tobytes() + b"\0"])
    return request(wrong)


def _any_tensor(tensor: wire.Tensor, name: str, field: str) -> tuple[Any, tuple[int, ...]]:
    return np.ones(3, dtype="<i8"), (3,)


DATUMS = Family(
    name="S5 datums",
    check=check,
    good=good,
    classes={
        "ids of prompts": prompt_ids,
        "ids of targets": target_ids,
        "NaN and Inf": no_numbers,
        "sizes": sizes,
        "torn bytes": torn_bytes,
        "dtypes": dtypes,
        "shapes": shapes,
        "CSR indices": csr,
        "losses": losses,
        "settings of losses": settings,
        "missing inputs": missing,
        "too many datums": too_many,
        "too many tokens": too_long,
        "torn prompts": no_tokens,
    },
    guards={
        "token ids": Guard(
            validation, "_check_token_ids", lambda *_: None, lets_in="ids of prompts"
        ),
        "tensors": Guard(validation, "_check_tensor", _any_tensor, lets_in="dtypes"),
        "CSR": Guard(validation, "_check_csr", lambda *_: None, lets_in="CSR indices"),
        "prompts": Guard(validation, "_check_model_input", lambda *_: 3, lets_in="torn prompts"),
        "names of losses": Guard(
            validation,
            "loss_spec",
            lambda _: LOSSES["cross_entropy"],
            also_in=(core_losses,),
            lets_in="losses",
        ),
        "settings of losses": Guard(
            validation, "loss_config", lambda _: {}, lets_in="settings of losses"
        ),
        "datums": Guard(validation, "_check_datum", lambda *_: (1, 1), lets_in="ids of targets"),
    },
    num_inputs=5000,
)
