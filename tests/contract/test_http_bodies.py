"""Bodies that are too large, compressed, damaged or no request at all; and the seq they use up."""

import gzip
import io
import json
from collections.abc import AsyncIterator

import pytest
from backports import zstd
from tests.contract.gateway_client import PROTOBUF, Api, Run, datum
from tests.contract.gateway_stack import MAX_BODY_BYTES

from luthier_core.proto import wire_pb2

JSON_ENDPOINTS = [
    "create_session",
    "session_heartbeat",
    f"sessions/{'0' * 32}/finish",
    "create_model",
    "get_info",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "load_weights",
    "create_sampling_session",
    "asample",
    "retrieve_future",
    "weights_info",
]


def too_large(run: Run, num_bytes: int = MAX_BODY_BYTES + 1) -> bytes:
    """A request under the run's next seq, with a loss input of that size."""
    message = run.message(datum(padding=wire_pb2.Tensor(dense=bytes(num_bytes))))
    return message.SerializeToString()


async def assert_goes_on(api: Api, run: Run) -> None:
    """What comes after a body that could not be read is executed, and nothing waits for it."""
    assert (await api.training_output(await run.forward_backward())).metrics["loss:sum"] > 0
    assert (await api.result(await run.step()))["metrics"]["grad_norm"] > 0


# --- too large ------------------------------------------------------------------------------------


async def test_a_body_over_the_limit_is_a_413_and_its_seq_is_used_up(api: Api):
    run = await api.run()
    body = too_large(run)
    answer = await run.post_bytes(body)
    assert answer.status == 413
    assert str(MAX_BODY_BYTES) in answer.detail
    assert str(MAX_BODY_BYTES) in await api.failure(f"{run.run_id}:1")
    assert (await run.post_bytes(body)).status == 413  # a retry
    await assert_goes_on(api, run)


async def test_a_large_body_counts_as_a_missing_gradient(api: Api):
    run = await api.run()
    await run.post_bytes(too_large(run))
    assert "gradient of seq 1 missing" in await api.failure(await run.step())
    await assert_goes_on(api, run)


async def test_a_body_of_unknown_length_is_limited_as_well(api: Api):
    run = await api.run()
    body = too_large(run, 4 * MAX_BODY_BYTES)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 8192):
            yield body[start : start + 8192]

    answer = await api.call("POST", "forward_backward", chunks(), content_type=PROTOBUF)
    assert answer.status == 413
    await api.failure(f"{run.run_id}:1")
    await assert_goes_on(api, run)


async def test_a_body_of_just_the_limit_is_read(api: Api):
    run = await api.run()
    empty = len(too_large(run, MAX_BODY_BYTES // 2)) - MAX_BODY_BYTES // 2
    run.next_seq = 1
    body = too_large(run, MAX_BODY_BYTES - empty)
    assert len(body) == MAX_BODY_BYTES
    answer = await run.post_bytes(body)
    assert answer.status == 200
    await api.training_output(answer.json()["request_id"])


async def test_a_large_body_of_a_stranger_uses_up_nothing(api: Api, stranger: Api):
    run = await api.run()
    answer = await Run(stranger, run.run_id).post_bytes(too_large(run))
    assert answer.status == 404
    run.next_seq = 1
    await assert_goes_on(api, run)


async def test_a_large_body_without_ids_is_a_413(api: Api):
    body = bytes(MAX_BODY_BYTES + 1)
    answer = await api.call("POST", "forward_backward", body, content_type=PROTOBUF)
    assert answer.status == 413


async def test_a_large_json_body_is_a_413(api: Api):
    text = json.dumps({"padding": "x" * 5_000_000}).encode()
    for endpoint in ("asample", "create_session", "optim_step", "retrieve_future"):
        assert (await api.call("POST", endpoint, io.BytesIO(text))).status == 413


# --- compressed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "compress"), [("zstd", zstd.compress), ("gzip", gzip.compress)]
)
async def test_a_compressed_body_is_the_same_request(api: Api, encoding: str, compress):
    run = await api.run()
    body = run.message(datum()).SerializeToString()
    answer = await run.post_bytes(compress(body), Content_Encoding=encoding)
    assert answer.status == 200
    assert (await run.post_bytes(body)).json() == answer.json()
    output = await api.training_output(answer.json()["request_id"])
    assert output.metrics["loss:sum"] > 0


@pytest.mark.parametrize(
    ("encoding", "compress"), [("zstd", zstd.compress), ("gzip", gzip.compress)]
)
async def test_a_bomb_is_stopped_at_the_limit_and_its_seq_is_used_up(
    api: Api, encoding: str, compress
):
    run = await api.run()
    bomb = compress(too_large(run, 512 * MAX_BODY_BYTES))
    assert len(bomb) < MAX_BODY_BYTES
    answer = await run.post_bytes(bomb, Content_Encoding=encoding)
    assert answer.status == 413
    assert "after decompression" in answer.detail
    await api.failure(f"{run.run_id}:1")
    await assert_goes_on(api, run)


async def test_a_frame_that_needs_a_large_window_is_a_422(api: Api):
    run = await api.run()
    body = run.message(datum()).SerializeToString()
    for window_log, status in ((27, 422), (23, 200)):
        # Of unknown size, so that the frame names the window and not its length.
        packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window_log})
        packed = packer.compress(body) + packer.flush()
        assert (await run.post_bytes(packed, Content_Encoding="zstd")).status == status


async def test_a_body_that_is_large_only_while_it_is_compressed_is_a_413(api: Api):
    run = await api.run()
    size = 17 * 1024 * 1024
    skipped = (0x184D2A50).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size)
    body = zstd.compress(run.message(datum()).SerializeToString()) + skipped
    answer = await api.call(
        "POST",
        "forward_backward",
        io.BytesIO(body),
        content_type=PROTOBUF,
        headers={"Content-Encoding": "zstd"},
    )
    assert answer.status == 413
    assert "compressed" in answer.detail
    await api.failure(f"{run.run_id}:1")
    await assert_goes_on(api, run)


async def test_members_one_after_the_other_are_one_body_but_not_too_many(api: Api):
    run = await api.run()
    body = run.message(datum()).SerializeToString()
    for pack, encoding in ((zstd.compress, "zstd"), (gzip.compress, "gzip")):
        packed = pack(body[:20]) + pack(body[20:])
        assert (await run.post_bytes(packed, Content_Encoding=encoding)).status == 200
        many = pack(b"") * 2000 + pack(body)
        assert (await run.post_bytes(many, Content_Encoding=encoding)).status == 422


async def test_an_encoding_that_is_not_known_is_named(api: Api):
    answer = await (await api.run()).post_bytes(b"x", Content_Encoding="br")
    assert answer.status == 400
    assert "'br'" in answer.detail
    assert "zstd" in answer.detail


@pytest.mark.parametrize("encoding", ["zstd", "gzip", "deflate"])
async def test_a_body_that_is_not_compressed_as_it_says_is_a_422(api: Api, encoding: str):
    run = await api.run()
    body = run.message(datum()).SerializeToString()
    # What follows on this connection could not be told from the rest of the body.
    answer = await run.post_bytes(body, Content_Encoding=encoding, Connection="close")
    assert answer.status == 422
    assert "Content-Encoding" in answer.detail
    run.next_seq = 1
    await assert_goes_on(api, run)


@pytest.mark.parametrize("cut", [1, 10, 40])
async def test_a_compressed_body_that_ends_too_early_is_no_request(api: Api, cut: int):
    run = await api.run()
    packed = zstd.compress(run.message(datum([5] * 60)).SerializeToString())
    answer = await run.post_bytes(packed[:-cut], Content_Encoding="zstd")
    assert answer.status == 422
    run.next_seq = 1
    await assert_goes_on(api, run)


# --- damaged --------------------------------------------------------------------------------------


async def test_a_damaged_request_whose_ids_can_be_read_fails_its_future(api: Api):
    run = await api.run()
    answer = await run.post_bytes(run.message(datum()).SerializeToString() + b"\xff")
    assert answer.status == 200
    assert "ForwardBackwardRequest" in await api.failure(answer.json()["request_id"])
    await assert_goes_on(api, run)


@pytest.mark.parametrize("body", [b"", b"\xff", b"\x0a\x05ab", b'{"model_id": "x", "seq_id": 1}'])
async def test_bytes_without_readable_ids_are_a_422(api: Api, body: bytes):
    answer = await api.call("POST", "forward_backward", body, content_type=PROTOBUF)
    assert answer.status == 422


@pytest.mark.parametrize("endpoint", JSON_ENDPOINTS)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 10_000])
async def test_a_body_that_is_no_json_object_is_a_422(api: Api, endpoint: str, body: bytes):
    answer = await api.call("POST", endpoint, body)
    assert answer.status == 422
    assert "JSON" in answer.detail


@pytest.mark.parametrize("endpoint", JSON_ENDPOINTS)
async def test_an_object_without_what_is_needed_says_what(api: Api, endpoint: str):
    if endpoint == "create_session":
        return
    answer = await api.call("POST", endpoint, b"{}")
    assert answer.status in (400, 422)
    assert any(word in answer.detail for word in ("_id", "path", "reason"))


async def test_json_without_its_content_type_is_read(api: Api):
    answer = await api.call("POST", "create_session", b"{}", content_type="text/plain")
    assert answer.status == 200


@pytest.mark.parametrize("endpoint", ["optim_step", "forward_backward", "forward", "asample"])
async def test_a_seq_id_that_is_a_bool_is_refused(api: Api, endpoint: str):
    run, sampler = await api.run(), await api.sampler()
    ids = {"model_id": run.run_id, "sampling_session_id": sampler.session_id, "seq_id": True}
    answer = await api.post(endpoint, ids)
    assert answer.status in (400, 422)
    assert "seq_id" in answer.detail


async def test_an_id_of_any_length_is_just_not_there(api: Api):
    for name in ("x" * 300, "é" * 5000):
        answer = await api.post("session_heartbeat", {"session_id": name})
        assert answer.status == 404
        assert len(answer.detail) < 500
