"""What the contract tests send to a gateway: bare HTTP and protobuf, no SDK."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np

from luthier_core.proto import wire_pb2

BASE_MODEL = "tiny/base"
PROTOBUF = "application/x-protobuf"


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers and body of one response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body, which must say that it is JSON and be an object."""
        assert self.headers["Content-Type"].startswith("application/json"), self
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value

    def json_or_none(self) -> dict[str, Any] | None:
        """The body, if it is JSON."""
        is_json = self.headers["Content-Type"].startswith("application/json")
        return self.json() if is_json else None

    @property
    def detail(self) -> str:
        """The sentence of an error."""
        assert self.status >= 400, self
        return str(self.json()["detail"])


class Api:
    """One gateway as seen with one API key."""

    def __init__(self, http: aiohttp.ClientSession, url: str, key: str | None) -> None:
        self.url = url
        self._http = http
        self._headers = {} if key is None else {"X-API-Key": key}

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        allow_redirects: bool = True,
    ) -> Answer:
        given = {**self._headers, **(headers or {})}
        if body is not None:
            given["Content-Type"] = content_type
        url = path if path.startswith("http") else f"{self.url}/api/v1/{path}"
        async with self._http.request(
            method, url, data=body, headers=given, allow_redirects=allow_redirects
        ) as response:
            answer = Answer(response.status, response.headers, await response.read())
        _check_error(answer)
        return answer

    async def get(self, path: str) -> Answer:
        return await self.call("GET", path)

    async def post(self, path: str, value: Any = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return await self.call("POST", path, json.dumps(value or {}).encode(), headers=named)

    async def accepted(self, path: str, value: Any) -> str:
        """The request_id of a request that is accepted."""
        answer = await self.post(path, value)
        assert answer.status == 200, answer
        return str(answer.json()["request_id"])

    # --- futures ----------------------------------------------------------------------------------

    async def poll(self, request_id: str, *, accept: str = PROTOBUF) -> Answer:
        """One long poll."""
        return await self.post("retrieve_future", {"request_id": request_id}, Accept=accept)

    async def outcome(self, request_id: str) -> Answer:
        """The answer once there is one; polled like the SDK does, without pauses."""
        while (answer := await self.poll(request_id)).status == 408:
            pass
        return answer

    async def result(self, request_id: str) -> dict[str, Any]:
        """The JSON of an op that succeeds."""
        answer = await self.outcome(request_id)
        assert answer.status == 200, answer
        value = answer.json()
        assert "error" not in value, value
        return value

    async def training_output(self, request_id: str) -> wire_pb2.ForwardBackwardOutput:
        """The result of a forward or forward_backward that succeeds."""
        return wire_pb2.ForwardBackwardOutput.FromString(await self._protobuf(request_id))

    async def samples(self, request_id: str) -> wire_pb2.SampleResponse:
        """The result of a sample that succeeds."""
        return wire_pb2.SampleResponse.FromString(await self._protobuf(request_id))

    async def failure(self, request_id: str, *, category: str = "user") -> str:
        """The message of an op that fails, which is told with status 200."""
        answer = await self.outcome(request_id)
        assert answer.status == 200, answer
        value = answer.json()
        assert value.keys() == {"error", "category"}, value
        assert value["category"] == category, value
        return str(value["error"])

    async def _protobuf(self, request_id: str) -> bytes:
        answer = await self.outcome(request_id)
        assert answer.status == 200, answer
        assert answer.headers["Content-Type"] == PROTOBUF, answer
        return answer.body

    # --- sessions and runs ------------------------------------------------------------------------

    async def session(self, **fields: Any) -> str:
        answer = await self.post("create_session", {"tags": [], "sdk_version": "0.38.0", **fields})
        assert answer.status == 200, answer
        return str(answer.json()["session_id"])

    async def run(self, session_id: str | None = None, **fields: Any) -> "Run":
        """A training run that has been created."""
        run = await self.run_unchecked(session_id, **fields)
        assert (await self.result(f"{run.run_id}:0"))["model_id"] == run.run_id
        return run

    async def run_unchecked(self, session_id: str | None = None, **fields: Any) -> "Run":
        """A training run whose creation has been accepted."""
        wanted = {
            "session_id": session_id or await self.session(),
            "model_seq_id": 0,
            "base_model": BASE_MODEL,
            "lora_config": {"rank": 4, "seed": 1},
            **fields,
        }
        answer = await self.post("create_model", wanted)
        assert answer.status == 200, answer
        return Run(self, answer.json()["model_id"])

    async def sampler(self, session_id: str | None = None, **fields: Any) -> "Sampler":
        """A sampling session of the base model, or of what `fields` name."""
        wanted = {
            "session_id": session_id or await self.session(),
            "sampling_session_seq_id": 0,
            **(fields or {"base_model": BASE_MODEL}),
        }
        answer = await self.post("create_sampling_session", wanted)
        assert answer.status == 200, answer
        return Sampler(self, answer.json()["sampling_session_id"])


@dataclass(slots=True)
class Run:
    """A training run that counts its requests as the SDK does: 1, 2, 3, ..."""

    api: Api
    run_id: str
    next_seq: int = 1

    def take_seq(self) -> int:
        self.next_seq += 1
        return self.next_seq - 1

    async def post(self, endpoint: str, **fields: Any) -> Answer:
        """A JSON request of the run, under its next seq unless `seq_id` is given."""
        seq = fields.pop("seq_id", None) or self.take_seq()
        return await self.api.post(endpoint, {"model_id": self.run_id, "seq_id": seq, **fields})

    async def send(self, endpoint: str, **fields: Any) -> str:
        """The request_id of a JSON request of the run."""
        answer = await self.post(endpoint, **fields)
        assert answer.status == 200, answer
        return str(answer.json()["request_id"])

    async def step(self, *, seq_id: int | None = None, **adam: float) -> str:
        """The request_id of an optimizer step."""
        params = {"learning_rate": 0.01, **adam}
        return await self.send("optim_step", seq_id=seq_id, adam_params=params)

    def message(self, *data: wire_pb2.Datum, **fields: Any) -> wire_pb2.ForwardBackwardRequest:
        """A request under the run's next seq unless `seq_id` is given."""
        seq = fields.pop("seq_id", None) or self.take_seq()
        wanted = {"loss_fn": "cross_entropy", "model_id": self.run_id, "seq_id": seq, **fields}
        return wire_pb2.ForwardBackwardRequest(data=data, **wanted)

    async def post_message(self, message: wire_pb2.ForwardBackwardRequest) -> Answer:
        return await self.post_bytes(message.SerializeToString())

    async def post_bytes(self, body: bytes, **headers: str) -> Answer:
        return await self.api.call(
            "POST",
            "forward_backward",
            body,
            content_type=PROTOBUF,
            headers={name.replace("_", "-"): text for name, text in headers.items()},
        )

    async def forward_backward(self, *data: wire_pb2.Datum, **fields: Any) -> str:
        """The request_id of a forward_backward; one good datum unless others are given."""
        answer = await self.post_message(self.message(*(data or [datum()]), **fields))
        assert answer.status == 200, answer
        return str(answer.json()["request_id"])


@dataclass(slots=True)
class Sampler:
    """A sampling session."""

    api: Api
    session_id: str
    next_seq: int = 0

    async def post(self, tokens: Sequence[int] = (1, 2, 3), **fields: Any) -> Answer:
        """asample under the next seq unless `seq_id` is given."""
        if "seq_id" not in fields:
            fields["seq_id"] = self.next_seq
            self.next_seq += 1
        wanted = {
            "sampling_session_id": self.session_id,
            "prompt": {"chunks": [{"tokens": list(tokens)}]},
            "sampling_params": {"max_tokens": 4},
            **fields,
        }
        return await self.api.post("asample", wanted)

    async def send(self, tokens: Sequence[int] = (1, 2, 3), **fields: Any) -> str:
        answer = await self.post(tokens, **fields)
        assert answer.status == 200, answer
        return str(answer.json()["request_id"])

    async def sample(
        self, tokens: Sequence[int] = (1, 2, 3), **fields: Any
    ) -> wire_pb2.SampleResponse:
        return await self.api.samples(await self.send(tokens, **fields))


def _check_error(answer: Answer) -> None:
    """Holds for every answer of every test: no 409, and each error is an object with a sentence."""
    assert answer.status != 409, "the SDK repeats a request that is answered with 409 for minutes"
    if answer.status >= 400 and answer.status != 408:
        value = answer.json()
        # The OpenAI API has a form of its own.
        detail = value["error"]["message"] if "error" in value else value["detail"]
        assert isinstance(detail, str)
        assert detail.strip(), answer


# --- parts of a request ---------------------------------------------------------------------------


def int64(values: object) -> wire_pb2.Tensor:
    return wire_pb2.Tensor(dense=np.array(values, "<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64)


def float32(values: object) -> wire_pb2.Tensor:
    return wire_pb2.Tensor(dense=np.array(values, "<f4").tobytes(), dtype=wire_pb2.DTYPE_FLOAT32)


def datum(tokens: Sequence[int] = (1, 2, 3), **inputs: wire_pb2.Tensor | None) -> wire_pb2.Datum:
    """A datum whose targets are its tokens, one on; an input that is None is left out."""
    wanted = {
        "target_tokens": int64([*tokens[1:], 0]),
        "weights": float32(np.ones(len(tokens))),
        **inputs,
    }
    text = wire_pb2.EncodedTextChunk(tokens=np.array(tokens, "<i4").tobytes())
    return wire_pb2.Datum(
        model_input=[wire_pb2.Chunk(encoded_text=text)],
        loss_fn_inputs={name: value for name, value in wanted.items() if value is not None},
    )


def logprobs_of(output: wire_pb2.ForwardBackwardOutput) -> list[list[float]]:
    """One list per datum."""
    values = []
    for record in output.loss_fn_outputs:
        tensor = record.fields["logprobs"]
        offsets = np.frombuffer(tensor.offsets, "<i8")
        assert len(offsets) == record.num_datums + 1
        for start, stop in pairwise(offsets):
            values.append(np.frombuffer(tensor.data[start:stop], "<f4").tolist())
    return values


def tokens_of(sequence: wire_pb2.SampledSequence) -> list[int]:
    return np.frombuffer(sequence.tokens, "<i4").tolist()


def floats_of(data: bytes) -> list[float]:
    return np.frombuffer(data, "<f4").tolist()
