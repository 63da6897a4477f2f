"""Malformed requests: a seeded stream of them, one generator per sort.

A generator gets a random.Random and a Target, the ids that exist, and makes one Case. What a case
may do: be answered with a 4xx, or be accepted and fail its future. `may_pass` marks the sorts that
change a good request at random, and so can make another good one.
"""

import gzip
import json
import random
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from backports import zstd
from tests.contract.gateway_client import BASE_MODEL, PROTOBUF, datum, float32, int64
from tests.contract.gateway_stack import MAX_CONTEXT_TOKENS, VOCAB_SIZE

from luthier_core.proto import wire_pb2 as wire

JSON = "application/json"
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstd.compress,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
}


@dataclass(frozen=True, slots=True)
class Target:
    """What exists: a run with its next seq, a session, and a sampling session with its next seq."""

    session_id: str
    run_id: str
    seq: int
    sampling_session_id: str
    sample_seq: int
    max_body_bytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """One request: POST to `path` unless another method is given."""

    path: str
    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    may_pass: bool = False
    piece_bytes: int = 0
    """Sent in chunks of that many bytes; 0: all at once, with its length."""

    async def pieces(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.body), self.piece_bytes):
            yield self.body[start : start + self.piece_bytes]


Generator = Callable[[random.Random, Target], Case]


def cases(seed: int, target_of: Callable[[], Target]) -> Iterator[tuple[str, Case]]:
    """(sort, case) for ever; every sort as often as the others."""
    choose = random.Random(seed)
    while True:
        for name, generate in GENERATORS.items():
            yield name, generate(choose, target_of())


# --- requests that are good -----------------------------------------------------------------------


def good_message(target: Target, *data: wire.Datum) -> wire.ForwardBackwardRequest:
    return wire.ForwardBackwardRequest(
        model_id=target.run_id,
        seq_id=target.seq,
        data=data or [datum([1, 2, 3])],
        loss_fn="cross_entropy",
    )


def good_json(target: Target) -> dict[str, dict[str, Any]]:
    """Endpoint -> a good body of it."""
    run = {"model_id": target.run_id, "seq_id": target.seq}
    inputs = {
        "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
        "weights": {"data": [0.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
    }
    data = [{"model_input": {"chunks": [{"tokens": [1, 2, 3]}]}, "loss_fn_inputs": inputs}]
    forward = {"data": data, "loss_fn": "cross_entropy", "loss_fn_config": {}}
    adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
    path = f"tinker://{target.run_id}/weights/none"
    return {
        "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0"},
        "session_heartbeat": {"session_id": target.session_id},
        "create_model": {
            "session_id": target.session_id,
            "model_seq_id": 0,
            "base_model": BASE_MODEL,
            "lora_config": {"rank": 4, "seed": 1},
            "user_metadata": {"a": "b"},
        },
        "get_info": {"model_id": target.run_id},
        "forward_backward": run | {"forward_backward_input": forward},
        "forward": run | {"forward_input": forward},
        "optim_step": run | {"adam_params": adam},
        "save_weights": run | {"path": "x", "ttl_seconds": 3600, "overwrite": True},
        "save_weights_for_sampler": run | {"path": "x", "ttl_seconds": 3600},
        "save_weights_external": run | {"path": "x"},
        "load_weights": run | {"path": path, "optimizer": True},
        "create_sampling_session": {
            "session_id": target.session_id,
            "sampling_session_seq_id": 5,
            "base_model": BASE_MODEL,
        },
        "join_sampling_session": {"sampling_session_id": target.sampling_session_id},
        "asample": {
            "sampling_session_id": target.sampling_session_id,
            "seq_id": target.sample_seq,
            "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
            "num_samples": 1,
            "sampling_params": {"max_tokens": 2, "stop": ["x"], "temperature": 1.0, "top_k": 3},
            "prompt_logprobs": True,
            "topk_prompt_logprobs": 1,
            "target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 1]},
        },
        "retrieve_future": {"request_id": f"{target.run_id}:0", "allow_metadata_only": True},
        "retrieve_futures": {"request_ids": [f"{target.run_id}:0"]},
        "cancel_future": {"request_id": f"{target.run_id}:0"},
        "weights_info": {"tinker_path": path},
        "copy_weights": {"source_path": path, "project_id": "p"},
        "sessions/search": {"session_id": target.session_id, "owner": {"type": "own"}},
        f"sessions/{target.session_id}/project": {"project_id": "p"},
        f"training_runs/{target.run_id}/checkpoints/weights/none/ttl": {"ttl_seconds": 3600},
        "telemetry": {"events": []},
    }


# --- protobuf -------------------------------------------------------------------------------------


def truncated(choose: random.Random, target: Target) -> Case:
    body = good_message(target).SerializeToString()
    # The loss is written last: without its end the request is not whole.
    return protobuf(body[: choose.randrange(len(body) - 1)])


def damaged(choose: random.Random, target: Target) -> Case:
    body = bytearray(good_message(target).SerializeToString())
    for _ in range(choose.randint(1, 4)):
        at = choose.randint(0, len(body))
        body[at : at + choose.randint(0, 4)] = choose.randbytes(choose.randint(0, 6))
    return protobuf(bytes(body), may_pass=True)


def random_bytes(choose: random.Random, target: Target) -> Case:
    head = wire.ForwardBackwardRequest(model_id=target.run_id, seq_id=target.seq)
    known = head.SerializeToString() if choose.random() < 0.5 else b""
    return protobuf(known + b"\xff" + choose.randbytes(choose.randint(0, 2000)))


def nested_protobuf(choose: random.Random, target: Target) -> Case:
    body = b""
    for _ in range(choose.choice([40, 200, 5000])):
        body = b"\x1a" + varint(len(body)) + body  # field 3, length-delimited: data
    groups = b"\xfb\x01" * choose.choice([40, 200, 50_000])  # field 31, start of a group
    head = wire.ForwardBackwardRequest(model_id=target.run_id, seq_id=target.seq)
    return protobuf(head.SerializeToString() + choose.choice([body, groups]))


def many_parts(choose: random.Random, target: Target) -> Case:
    """Map keys, datums or numbers of a shape, more than anyone has use for."""
    head = wire.ForwardBackwardRequest(model_id=target.run_id, seq_id=target.seq)
    number = min(1_000_000, target.max_body_bytes // 20)
    body = head.SerializeToString() + _parts(choose.choice(["keys", "datums", "shape"]), number)
    if choose.random() < 0.5:
        return protobuf(body)
    return protobuf(zlib.compress(body, 1), headers={"Content-Encoding": "deflate"})


@cache
def _parts(kind: str, number: int) -> bytes:
    if kind == "datums":
        return b"\x1a\0" * number
    if kind == "shape":
        tensor = wire.Tensor(shape=[1] * number, dense=b"")
        data = wire.Datum(loss_fn_inputs={"weights": tensor})
    else:
        keys = b"".join(b"\x12\x0c\n\x06%06d\x12\x02\x18\x01" % key for key in range(number))
        return b"\x1a" + varint(len(keys)) + keys
    return wire.ForwardBackwardRequest(data=[data], loss_fn="cross_entropy").SerializeToString()


def lying_tensor(choose: random.Random, target: Target) -> Case:
    """Dense tensors whose dtype, shape, size or values cannot be."""
    name, wrong = choose.choice(list(_lies(choose)))
    return protobuf(good_message(target, datum([1, 2, 3], **{name: wrong})).SerializeToString())


def _lies(choose: random.Random) -> Iterator[tuple[str, wire.Tensor]]:
    weights, tokens = float32([1, 1, 1]).dense, int64([1, 2, 3]).dense
    shapes = ([4], [2], [-3], [3, 0], [0], [3, 3], [1, 3], [2**62, 4], [2**32, 2**32], [3] * 40)
    for shape in shapes:
        yield "weights", wire.Tensor(dense=weights, dtype=wire.DTYPE_FLOAT32, shape=shape)
        yield "target_tokens", wire.Tensor(dense=tokens, dtype=wire.DTYPE_INT64, shape=shape)
    for dtype in (0, 2, 3, 99):
        yield "weights", wire.Tensor(dense=weights, dtype=dtype)
    for size in (0, 1, 3, 11, 13, 8000):
        dense = choose.randbytes(size)
        yield "weights", wire.Tensor(dense=dense, dtype=wire.DTYPE_FLOAT32)
        yield "target_tokens", wire.Tensor(dense=dense, dtype=wire.DTYPE_INT64)
    for value in (float("nan"), float("inf"), -float("inf")):
        yield "weights", float32(shuffled(choose, [1.0, value, 1.0]))
    for token in (-1, VOCAB_SIZE, 2**31, 2**62, -(2**63)):
        yield "target_tokens", int64(shuffled(choose, [1, token, 2]))


def lying_csr(choose: random.Random, target: Target) -> Case:
    """Sparse tensors whose indices lead nowhere."""
    rows, columns, shape = [0, 1, 2, 3], [0, 1, 0], [3, 2]
    which = choose.randrange(8)
    if which == 0:
        columns[choose.randrange(3)] = choose.choice([-1, 2, 2**40, -(2**63)])
    elif which == 1:
        rows[choose.randrange(1, 4)] = choose.choice([-1, 9, 2**40])
    elif which == 2:
        rows = [0, 2, 1, 3]
    elif which == 3:
        rows = rows[: choose.randrange(4)]
    elif which == 4:
        columns = columns * choose.choice([0, 2])
    elif which == 5:
        shape = choose.choice([[3], [3, 2, 1], [], [4, 2], [2**40, 2], [-3, -2]])
    elif which == 6:
        rows[0] = choose.choice([1, -1])
    csr = wire.SparseCsr(
        values=float32([1, 1, 1]).dense,
        crow_indices=int64(rows).dense,
        col_indices=int64(columns).dense,
    )
    if which == 7:
        csr.crow_indices = csr.crow_indices[:-3]
    tensor = wire.Tensor(sparse_csr=csr, dtype=wire.DTYPE_FLOAT32, shape=shape)
    tokens = wire.Tensor(
        dense=int64([1, 2, 3, 4, 5, 6]).dense, dtype=wire.DTYPE_INT64, shape=[3, 2]
    )
    data = datum([1, 2, 3], weights=tensor, target_tokens=tokens)
    return protobuf(good_message(target, data).SerializeToString())


def lying_input(choose: random.Random, target: Target) -> Case:
    """Prompts that are empty, too long, of ids that do not exist, or of no whole ids."""
    wrong = datum([1, 2, 3])
    text = wrong.model_input[0].encoded_text
    text.tokens = choose.choice(
        [
            b"",
            b"\x01\x00\x00",
            np.full(MAX_CONTEXT_TOKENS + 1, 1, "<i4").tobytes(),
            np.array([VOCAB_SIZE, -1, 2**31 - 1], "<i4").tobytes(),
        ]
    )
    if choose.random() < 0.2:
        del wrong.model_input[:]
    data = [wrong] * choose.choice([1, 5])
    return protobuf(good_message(target, *data).SerializeToString())


# --- JSON -----------------------------------------------------------------------------------------

BAD_NAMES = (
    *("../x", "..", ".", "a/b", "/etc/x", "a\0b", "", " ", "x" * 129, "x" * 10_000, "é", "\u202e"),
    *("a\nb", "%2e%2e%2fx", "C:\\x", "-x", "~", "x;y", "x?y", "a\\..\\b"),
)
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 2**64 - 1, 1e308, -1e308, 0.5, "", "x", "\0", "é" * 5000),
    *("../../etc/passwd", "tinker://", [], {}, [[]], [{}], [None], {"": ""}, {"a": {"b": []}}),
    *(["x"] * 2000, [1.5] * 2000, "9" * 10_000, {"type": "image", "data": "AA=="}),
)


def wrong_type(choose: random.Random, target: Target) -> Case:
    """A good request with one to three parts replaced."""
    path, body = choose.choice(list(good_json(target).items()))
    body = deepcopy(body)
    for _ in range(choose.randint(1, 3)):
        _replace(choose, body)
    return Case(path, json.dumps(body).encode(), may_pass=True, method=method_of(path))


def _replace(choose: random.Random, value: Any) -> None:
    """Walks down at random and puts something wrong where it stops."""
    while True:
        names = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not names:
            return
        name = choose.choice(names)
        inner = value[name]
        if not isinstance(inner, dict | list) or choose.random() < 0.3:
            value[name] = deepcopy(choose.choice(WRONG))
            return
        value = inner


def lying_json_tensor(choose: random.Random, target: Target) -> Case:
    """A JSON tensor of an older SDK that does not fit its shape, its dtype or its datum."""
    path = choose.choice(["forward", "forward_backward"])
    body = deepcopy(good_json(target)[path])
    inputs = body["forward_input" if path == "forward" else "forward_backward_input"]["data"][0]
    tensor = inputs["loss_fn_inputs"][choose.choice(["weights", "target_tokens"])]
    tensor |= choose.choice(
        [
            {"shape": [4]},
            {"shape": [-3]},
            {"shape": [2**40, 2**40]},
            {"shape": [3, 0]},
            {"data": [1, 2]},
            {"data": [1, "x", 3]},
            {"data": [[1], [2], [3]]},
            {"data": [2**70, 1, 1], "dtype": "int64"},
            {"data": [1e39, 1, 1], "dtype": "float32"},
            {"data": [None, None, None]},
            {"dtype": "complex128"},
            {"sparse_crow_indices": [0, 9], "sparse_col_indices": [5]},
            {"sparse_crow_indices": [0, 1, 2, 3], "sparse_col_indices": [0, -1, 2**40]},
            {"sparse_crow_indices": [0, 1, 2, 3]},
        ]
    )
    return Case(path, json.dumps(body).encode())


def no_json(choose: random.Random, target: Target) -> Case:
    """Bytes that are no JSON object, or one that nobody should read to its end."""
    path = choose.choice(list(good_json(target)))
    number = choose.choice([33, 1000, 100_000])
    deep = choose.choice([("[", "]"), ('{"a":', "}")])
    body = choose.choice(
        [
            choose.randbytes(50),
            b"\xff\xfe{\x00}\x00",
            b'{"model_id": "\\ud800"}',
            b'{"seq_id": NaN}',
            b'{"seq_id": ' + b"9" * 10_000 + b"}",
            b"{" * number,
            b"[" * number,
            ('{"x": ' + deep[0] * number + "1" + deep[1] * number + "}").encode(),
            json.dumps({str(index): 0 for index in range(20_000)}).encode(),
            json.dumps(good_json(target)[path]).encode()[:-2],
        ]
    )
    if path == "telemetry":  # its body is not looked at
        path = "asample"
    return Case(path, body, method=method_of(path))


def bad_name(choose: random.Random, target: Target) -> Case:
    """Names of checkpoints that would leave their folder, or that no folder could hold."""
    name = choose.choice(BAD_NAMES)
    path = choose.choice(["save_weights", "save_weights_for_sampler", "save_weights_external"])
    body = good_json(target)[path] | {"path": name}
    if choose.random() < 0.4:
        path = "load_weights"
        kind = choose.choice(["weights", "../weights", "sampler_weights"])
        body = good_json(target)[path] | {"path": f"tinker://{target.run_id}/{kind}/{name}"}
    return Case(path, json.dumps(body).encode())


# --- compression and framing ----------------------------------------------------------------------


def bomb(choose: random.Random, target: Target) -> Case:
    """A small body that becomes one beyond the limit: a message whose last field never ends."""
    encoding = choose.choice(list(PACKERS))
    head = good_message(target).SerializeToString() + b"\x1a" + varint(target.max_body_bytes)
    body = PACKERS[encoding](head) + _zeros(encoding, target.max_body_bytes + 1)
    return protobuf(body, headers={"Content-Encoding": encoding})


def json_bomb(choose: random.Random, target: Target) -> Case:
    """Compressed JSON of one long string, or of nothing but lists."""
    path = choose.choice([path for path in good_json(target) if path != "telemetry"])
    encoding = choose.choice(list(PACKERS))
    pack = PACKERS[encoding]
    if choose.random() < 0.5:
        size = max(target.max_body_bytes, 8 * 1024 * 1024)
        body = pack(b'{"x": "') + _zeros(encoding, size) + pack(b'"}')
    else:
        body = pack(b'{"x": [' + b"[]," * min(1_000_000, target.max_body_bytes // 4) + b"1]}")
    # Short lists may pass in a field that nobody reads.
    return Case(
        path,
        body,
        headers={"Content-Encoding": encoding},
        method=method_of(path),
        may_pass=target.max_body_bytes < 2**20,
    )


@cache
def _zeros(encoding: str, size: int) -> bytes:
    """A frame or member of its own."""
    return PACKERS[encoding](bytes(size))


def bad_frame(choose: random.Random, target: Target) -> Case:
    """A compressed body that is cut or none at all, of many members, or of an odd encoding."""
    encoding = choose.choice(list(PACKERS))
    pack = PACKERS[encoding]
    good = good_message(target).SerializeToString()
    packed = bytearray(pack(good))
    at = choose.randrange(len(packed))
    body, encoding = choose.choice(
        [
            (bytes(packed[:at]), encoding),
            (good, encoding),
            (bytes(packed), choose.choice(["br", "zstd, gzip", "x" * 500])),
            (pack(b"") * 1500 + bytes(packed), encoding),
            (choose.randbytes(100), encoding),
        ]
    )
    return protobuf(body, headers={"Content-Encoding": encoding})


def byte_by_byte(choose: random.Random, target: Target) -> Case:
    """Chunks of one byte: a truncated request, or one that says it is compressed."""
    good = good_message(target).SerializeToString()
    if choose.random() < 0.5:
        return protobuf(good[: choose.randrange(1, len(good) - 1)], piece_bytes=1)
    return protobuf(good, piece_bytes=1, headers={"Content-Encoding": choose.choice(list(PACKERS))})


def protobuf(body: bytes, **fields: Any) -> Case:
    return Case("forward_backward", body, PROTOBUF, **fields)


def method_of(path: str) -> str:
    return "PUT" if path.endswith(("/project", "/ttl")) else "POST"


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def shuffled(choose: random.Random, values: list[Any]) -> list[Any]:
    return choose.sample(values, len(values))


GENERATORS: dict[str, Generator] = {
    "truncated protobuf": truncated,
    "damaged protobuf": damaged,
    "random bytes": random_bytes,
    "nested protobuf": nested_protobuf,
    "many parts": many_parts,
    "tensors that lie": lying_tensor,
    "CSR indices that lie": lying_csr,
    "prompts that lie": lying_input,
    "wrong types": wrong_type,
    "JSON tensors that lie": lying_json_tensor,
    "no JSON": no_json,
    "names of checkpoints": bad_name,
    "bombs": bomb,
    "JSON bombs": json_bomb,
    "bad frames": bad_frame,
    "byte by byte": byte_by_byte,
}
