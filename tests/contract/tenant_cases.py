"""What each route is called with, for the matrix of routes, ids and callers.

A route that is not here fails the matrix: a new one needs a line that says how its owner calls it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.contract import adapter_uploads
from tests.contract.gateway_client import BASE_MODEL, Api

PARAMETER = re.compile(r"\{(\w+)(?::[^}]*)?\}")


@dataclass(frozen=True, slots=True)
class Case:
    """One route as its owner calls it. {names} in body and query stand for ids."""

    body: Mapping[str, Any] | None = None
    query: str = ""
    status: int = 200
    """What the owner gets; 400 for what this server refuses everybody."""
    turn: int = 0
    """What ends something that other calls need has a later turn."""
    operator: bool = False
    """Its owner is an operator."""
    ignores_unknown: bool = False
    """An id that is nobody's is no error: the call is idempotent."""


FORWARD_INPUT = {
    "data": [
        {
            "model_input": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3, 0], "dtype": "int64", "shape": [3]},
                "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
            },
        }
    ],
    "loss_fn": "cross_entropy",
}
CUSTOM_LOSS = {
    "inputs": [{"name": "logprobs", "rank": 1}],
    "graph": {
        "nodes": [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
            {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "logprobs"}]},
            {
                "op": "output",
                "name": "output",
                "target": "output",
                "args": [{"tuple": [{"ref": "sum_1"}, {"dict": {}}]}],
            },
        ]
    },
}
_REFUSED = Case(status=400)
_RUN = {"model_id": "{run_id}"}

API = "/api/v1"
_CKPT = f"{API}/training_runs/{{run_id}}/checkpoints/{{kind}}/{{name}}"
_ORG = f"{API}/admin/orgs/{{org}}"

CASES: dict[tuple[str, str], Case] = {
    # First: afterwards a stranger's own log tells of the ids that they have tried.
    ("GET", f"{API}/audit"): Case(query="day={today}"),
    ("GET", "/health"): Case(),
    ("POST", f"{API}/client/config"): Case({"sdk_version": "0.38.0"}),
    ("POST", f"{API}/client/dynamic_config"): Case({"sdk_version": "0.38.0"}),
    ("POST", f"{API}/create_session"): Case({"tags": [], "sdk_version": "0.38.0"}),
    ("POST", f"{API}/session_heartbeat"): Case({"session_id": "{session_id}"}),
    ("POST", f"{API}/sessions/{{session_id}}/finish"): Case(
        {"reason": {"type": "success"}}, turn=1
    ),
    ("POST", f"{API}/telemetry"): Case({"session_id": "{session_id}"}, ignores_unknown=True),
    ("GET", f"{API}/get_server_capabilities"): Case(),
    ("POST", f"{API}/create_model"): Case(
        {
            "session_id": "{session_id}",
            "model_seq_id": 7,
            "base_model": BASE_MODEL,
            "lora_config": {"rank": 4},
        }
    ),
    ("POST", f"{API}/get_info"): Case(_RUN),
    ("POST", f"{API}/forward_backward"): Case(
        {**_RUN, "seq_id": 4, "forward_backward_input": FORWARD_INPUT}
    ),
    ("POST", f"{API}/forward"): Case({**_RUN, "seq_id": 5, "forward_input": FORWARD_INPUT}),
    ("POST", f"{API}/optim_step"): Case(
        {**_RUN, "seq_id": 6, "adam_params": {"learning_rate": 0.01}}
    ),
    ("POST", f"{API}/save_weights"): Case({**_RUN, "seq_id": 7, "path": "y"}),
    ("POST", f"{API}/save_weights_for_sampler"): Case({**_RUN, "seq_id": 8, "path": "y"}),
    ("POST", f"{API}/save_weights_external"): Case({**_RUN, "seq_id": 9, "path": "y"}),
    ("POST", f"{API}/load_weights"): Case({**_RUN, "seq_id": 10, "path": "{tinker_path}"}),
    ("POST", f"{API}/create_sampling_session"): Case(
        {"session_id": "{session_id}", "sampling_session_seq_id": 7, "model_path": "{tinker_path}"}
    ),
    ("POST", f"{API}/join_sampling_session"): Case({"sampling_session_id": "{sampler_id}"}),
    ("POST", f"{API}/asample"): Case(
        {
            "sampling_session_id": "{sampler_id}",
            "seq_id": 7,
            "prompt": {"chunks": [{"tokens": [1, 2]}]},
            "sampling_params": {"max_tokens": 2},
        }
    ),
    ("POST", f"{API}/retrieve_future"): Case({"request_id": "{request_id}"}),
    ("POST", f"{API}/retrieve_futures"): Case(
        {"target": {"sampling_session_id": "{sampler_id}"}, "timeout": 0}
    ),
    ("POST", f"{API}/cancel_future"): Case({"request_id": "{sample_id}"}, ignores_unknown=True),
    ("GET", f"{API}/futures/{{request_id}}"): Case(),
    ("POST", f"{API}/weights_info"): Case({"tinker_path": "{tinker_path}"}),
    ("POST", f"{API}/copy_weights"): Case(
        {"source_path": "{tinker_path}", "destination_project_id": "blue"}
    ),
    ("GET", f"{API}/samplers/{{sampler_id}}"): Case(),
    ("GET", f"{API}/training_runs"): Case(query="limit=1000&access_scope=accessible"),
    ("GET", f"{API}/training_runs/{{run_id}}"): Case(query="access_scope=accessible"),
    ("GET", f"{API}/training_runs/{{run_id}}/checkpoints"): Case(),
    ("GET", f"{API}/models/{{run_id}}/checkpoints"): Case(),
    ("DELETE", _CKPT): Case(turn=2),
    ("POST", f"{_CKPT}/publish"): Case(turn=1),
    ("DELETE", f"{_CKPT}/publish"): Case(),
    ("PUT", f"{_CKPT}/ttl"): Case({"ttl_seconds": 3600}),
    ("GET", f"{API}/training_runs/{{run_id}}/keep_last"): Case(),
    ("PUT", f"{API}/training_runs/{{run_id}}/keep_last"): Case({"keep_last": 9}),
    ("GET", f"{_CKPT}/archive"): Case(),
    ("GET", f"{_CKPT}/external_weights_urls"): Case(),
    ("POST", f"{API}/uploads"): Case(
        {
            "base_model": BASE_MODEL,
            "adapter_config": {"r": 4},
            "num_bytes": 100,
            "sha256": "0" * 64,
            "name": "x",
            "project_id": "blue",
        }
    ),
    # What is there already is answered without a look at the body.
    ("PUT", f"{API}/uploads/{{upload_id}}"): Case(),
    ("GET", f"{API}/checkpoints"): Case(query="limit=1000"),
    ("GET", f"{API}/sessions"): Case(query="limit=1000"),
    ("POST", f"{API}/sessions/search"): Case({"session_id": "{session_id}"}, ignores_unknown=True),
    ("GET", f"{API}/sessions/{{session_id}}"): Case(),
    ("PUT", f"{API}/sessions/{{session_id}}/project"): Case({"project_id": "blue"}),
    ("GET", f"{API}/sessions/{{session_id}}/trace_export"): Case(),
    ("GET", f"{API}/auth/apikey/me"): Case(),
    ("DELETE", f"{API}/auth/apikey/me"): Case(turn=3),
    ("POST", f"{API}/auth/apikey"): _REFUSED,
    ("POST", f"{API}/auth/token"): _REFUSED,
    ("GET", f"{API}/billing/usage/events"): Case(
        query="starting_on={today}T00:00&ending_before={today}T23:59"
    ),
    ("GET", f"{API}/billing/usage/checkpoints/current"): Case(),
    ("GET", f"{API}/training_runs/{{run_id}}/metrics"): Case(),
    ("GET", f"{_ORG}/usage"): Case(
        query="by=run&starting_on={today}T00:00&ending_before={today}T23:59"
    ),
    ("GET", f"{API}/admin/queues"): Case(),
    ("GET", f"{API}/sessions/{{session_id}}/queue"): Case(),
    ("POST", f"{API}/training_runs/{{run_id}}/cancel_queued"): Case(),
    # There is but one trainer.
    ("POST", f"{API}/admin/runs/{{run_id}}/move"): Case({}, status=400, operator=True),
    ("POST", f"{API}/admin/trainers/{{trainer}}/drain"): Case(status=400, operator=True),
    ("DELETE", f"{API}/admin/trainers/{{trainer}}/drain"): Case(operator=True),
    ("GET", f"{API}/admin/jobs"): Case(operator=True),
    ("POST", f"{API}/admin/jobs/{{job}}"): Case(operator=True),
    ("GET", f"{API}/openapi.json"): Case(),
    ("GET", f"{API}/admin/orgs"): Case(operator=True),
    ("POST", f"{API}/create_custom_loss"): Case(
        {"session_id": "{session_id}", "custom_loss_seq_id": 0, "name": "loss", **CUSTOM_LOSS}
    ),
    ("POST", f"{API}/admin/orgs"): Case({"org_id": "cleo"}, operator=True),
    ("GET", _ORG): Case(),
    ("PATCH", _ORG): Case({"name": "Ann"}, operator=True),
    ("GET", f"{_ORG}/projects"): Case(),
    ("POST", f"{_ORG}/projects"): Case({"project_id": "red"}),
    ("GET", f"{_ORG}/users"): Case(),
    ("POST", f"{_ORG}/users"): Case({"user_id": "lee", "email": "lee@ann.example"}),
    ("DELETE", f"{_ORG}/users/{{user}}"): Case(turn=2),
    ("GET", f"{_ORG}/keys"): Case(),
    ("POST", f"{_ORG}/keys"): Case({"name": "another"}),
    ("DELETE", f"{_ORG}/keys/{{key_id}}"): Case(turn=2),
    ("GET", f"{_ORG}/audit/check"): Case(),
}

for _prefix in ("/oai/api/v1", "/v1"):
    CASES |= {
        ("GET", f"{_prefix}/models"): Case(),
        ("GET", f"{_prefix}/models/{{model}}"): Case(),
        ("POST", f"{_prefix}/completions"): Case(
            {"model": "{model}", "prompt": "a", "max_tokens": 2}
        ),
        ("POST", f"{_prefix}/chat/completions"): Case(
            {"model": "{model}", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        ),
    }


@dataclass(frozen=True, slots=True)
class Request:
    """One call, its ids filled in."""

    method: str
    path: str
    body: bytes | None
    given: tuple[str, ...] = field(default=())
    """The ids in it."""


def plain(path: str) -> str:
    """A route's path without the patterns of its parts."""
    return PARAMETER.sub(r"{\1}", path)


def id_names(method: str, path: str) -> list[str]:
    """The ids that a route takes, in its path, query and body."""
    case = CASES[method, path]
    text = f"{path} {case.query} {_template(case)}"
    return sorted(
        {name for name in PARAMETER.findall(text) if name not in ("kind", "today", "job")}
    )


def request(method: str, path: str, ids: Mapping[str, str]) -> Request:
    """The call of a route with these ids."""
    case = CASES[method, path]
    query = f"?{_fill(case.query, ids)}" if case.query else ""
    body = None if case.body is None else _fill(_template(case), ids).encode()
    given = tuple(ids[name] for name in id_names(method, path))
    return Request(method, _fill(path, ids) + query, body, given)


def substitutions(method: str, path: str, ids: Mapping[str, str]) -> Iterator[Request]:
    """The owner's call, and every call in which one id is replaced by one of another sort."""
    yield request(method, path, ids)
    for name in id_names(method, path):
        for other, value in ids.items():
            if other not in (name, "kind", "today", "job"):
                yield request(method, path, {**ids, name: value})


async def one_of_each(owner: Api, org: str, text: str) -> dict[str, str]:
    """One id of every sort, of things of `org` that are there; where there is text, it is this."""
    session = await owner.session(user_metadata={"note": text}, project_id="blue")
    run = await owner.run(session, user_metadata={"note": text})
    await owner.result(await run.step())
    await owner.result(await run.send("save_weights", path="x"))
    sampled = await owner.result(await run.send("save_weights_for_sampler", path="s"))
    sampler = await owner.sampler(session)
    sample = await sampler.send()
    await owner.samples(sample)
    for path, body in (
        ("users", {"user_id": "kim", "email": f"{text}@ann.example"}),
        ("projects", {"project_id": "blue", "name": text}),
    ):
        assert (await owner.post(f"admin/orgs/{org}/{path}", body)).status == 200
    key = (await owner.post(f"admin/orgs/{org}/keys", {"name": text})).json()
    uploaded = (await adapter_uploads.GOOD.send(owner)).json()
    return {
        "session_id": session,
        "run_id": run.run_id,
        "sampler_id": sampler.session_id,
        "request_id": f"{run.run_id}:1",
        "sample_id": sample,
        "tinker_path": f"tinker://{run.run_id}/weights/x",
        "model": sampled["path"],
        "kind": "weights",
        "name": "x",
        "org": org,
        "user": "kim",
        "project_id": "blue",
        "key_id": key["key_id"],
        "upload_id": uploaded["tinker_path"].removeprefix("tinker://").partition(":")[0],
        "job": "usage",
        "trainer": "trainer",
        "today": datetime.now(UTC).date().isoformat(),
    }


def _template(case: Case) -> str:
    return "" if case.body is None else json.dumps(case.body)


def _fill(text: str, ids: Mapping[str, str]) -> str:
    # Not str.format: the braces of JSON are not ours.
    return PARAMETER.sub(lambda found: ids[found[1]], text)
