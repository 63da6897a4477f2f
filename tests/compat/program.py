"""Calls every public method of whichever `tinker` is importable, against one running server.

    TINKER_BASE_URL=... TINKER_API_KEY=... python program.py

One line of JSON per method and feature: its name, how it went (works | refused | absent | fails)
and why. It runs with releases far apart, so it imports nothing but that SDK and what it needs.
"""

import asyncio
import inspect
import itertools
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, get_args

import tinker
import torch
from tinker import types

BASE_MODEL = "luthier/demo"
TIMEOUT_S = 60
TOKENS = [5, 6, 7, 8, 9, 10]
CLASSES = {
    "ServiceClient": "service_client",
    "TrainingClient": "training_client",
    "SamplingClient": "sampling_client",
    "RestClient": "rest_client",
    "AdminClient": "admin_client",
}
"""Public class -> its module in the SDK."""

LOCAL = frozenset(
    {"get_telemetry", "on_queue_state_change", "holder", "get_console_url", "SamplingClient.create"}
)
"""Not calls of the server: what the SDK keeps to itself, or asks of its user."""


@dataclass(frozen=True)
class Refusal:
    """Something that the server may refuse, and how it has to."""

    reason: str
    """What users read in the report."""
    says: str
    """Part of the server's own sentence: anything else that goes wrong is no refusal."""


REFUSED = {
    "RestClient.whoami": Refusal(
        "needs the JWT exchange, which a server of one's own has no issuer for",
        "there is no exchange",
    ),
    "feature: dimuon": Refusal("the only optimizer is AdamW", "supported is 'adamw'"),
    "feature: stable_reinforce": Refusal("no public definition of this loss", "stable_reinforce"),
    "feature: age encryption": Refusal(
        "external weights are stored as the store encrypts them", "age_encryption_recipients"
    ),
    "feature: image": Refusal("models read text only", "'image'"),
    "feature: image asset pointer": Refusal("models read text only", "'image_asset_pointer'"),
    "feature: audio": Refusal("models read text only", "'dmel'"),
}
"""What may be refused: everything else has to work."""


SDK_LOOP_ONLY = "AsyncTinker client called from incorrect event loop"
"""`get_audit_log_async` of some releases asserts that it runs in the SDK's own event loop, which
no user can do: it fails before a request is made, whatever the server."""


class Refused(Exception):
    """A request of this program, not of the SDK, was answered with a 4xx."""

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code = status_code


class Absent(Exception):
    """This release of the SDK has no such thing."""


@dataclass(frozen=True)
class Call:
    """One public method, called with new arguments for itself and for its async twin."""

    target: Callable[[], Any]
    arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    check: Callable[[Any], object] = lambda value: True


def args(*given: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return given, named


def resolve(value: Any) -> Any:
    """What a method gives in the end: some return futures, in some releases only."""
    return value.result(timeout=TIMEOUT_S) if hasattr(value, "result") else value


async def resolve_async(value: Any) -> Any:
    async with asyncio.timeout(TIMEOUT_S):
        while inspect.isawaitable(value):
            value = await value
    return value


def post(path: str, value: dict[str, Any]) -> None:
    """A request that no release sends by itself; raises Refused for a 4xx."""
    headers = {"X-API-Key": os.environ["TINKER_API_KEY"], "Content-Type": "application/json"}
    url = f"{os.environ['TINKER_BASE_URL']}/api/v1/{path}"
    request = urllib.request.Request(url, json.dumps(value).encode(), headers)
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        with error:
            raise Refused(error.code, error.read().decode()) from None


def invoke(name: str, call: Call) -> None:
    """Calls the method and its async twin; raises what they raise, or AssertionError."""
    method = name.partition(".")[2]
    given, named = call.arguments()
    value = resolve(getattr(call.target(), method)(*given, **named))
    assert call.check(value), f"unexpected result: {value!r}"
    twin = getattr(call.target(), f"{method}_async", None)
    if twin is None:
        return

    async def run() -> Any:
        given, named = call.arguments()
        return await resolve_async(twin(*given, **named))

    try:
        value = asyncio.run(run())
    except AssertionError as error:
        if str(error) == SDK_LOOP_ONLY:
            return
        raise
    assert call.check(value), f"unexpected result of the async twin: {value!r}"


# --- the world that calls are made in -------------------------------------------------------------


def tensor(values: list[Any]) -> Any:
    return types.TensorData.from_torch(torch.tensor(values))


def make_datum(tokens: list[int]) -> Any:
    inputs = {"target_tokens": tensor([*tokens[1:], 1]), "weights": tensor([1.0] * len(tokens))}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def make_world() -> SimpleNamespace:
    """One session with a trained run and its checkpoints, for every call to use."""
    w = SimpleNamespace(numbers=itertools.count())
    w.service = tinker.ServiceClient()
    w.rest = w.service.create_rest_client()
    w.training = resolve(w.service.create_lora_training_client(BASE_MODEL, rank=4, seed=1))
    w.data = [make_datum(TOKENS), make_datum(TOKENS[:3])]
    w.prompt = types.ModelInput.from_ints(TOKENS)
    w.params = types.SamplingParams(max_tokens=3, temperature=0.0)
    w.training.forward_backward(w.data, "cross_entropy").result(timeout=TIMEOUT_S)
    w.training.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=TIMEOUT_S)
    w.state = w.training.save_state("program").result(timeout=TIMEOUT_S).path
    w.weights = w.training.save_weights_for_sampler("program").result(timeout=TIMEOUT_S).path
    w.sampling = resolve(w.service.create_sampling_client(model_path=w.weights))
    w.run_id = w.state.removeprefix("tinker://").partition("/")[0]
    w.session_id = w.run_id.partition(":")[0]
    w.name = lambda: f"n{next(w.numbers)}"
    w.new_state = lambda: w.training.save_state(w.name()).result(timeout=TIMEOUT_S).path
    return w


def sum_of_logprobs(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    total = -torch.stack([values.sum() for values in logprobs]).sum()
    return total, {"total": float(total)}


def per_datum_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/loss:sum": loss}


def runs_on_the_server(w: SimpleNamespace, handle: Any) -> bool:
    """Whether the server took the traced loss; the SDK runs the loss itself if it did not."""
    output = resolve(w.training.forward_backward_custom(w.data, handle))
    assert output.metrics["custom/loss:sum"] > 0, output.metrics
    return handle.loss_id is not None


class Whoami:
    """`whoami`, which reads a token that the SDK gets from the server beforehand."""

    def __init__(self, rest: Any) -> None:
        self._rest = rest

    def whoami(self) -> Any:
        try:
            return resolve(self._rest.whoami())
        except RuntimeError:  # there is no token
            post("auth/token", {})
            raise


def scored(count: int) -> Callable[[Any], bool]:
    """The result has logprobs for each datum, and the loss."""
    return lambda r: len(r.loss_fn_outputs) == count and "loss:sum" in r.metrics


def sampled(count: int = 1) -> Callable[[Any], bool]:
    return lambda r: (
        len(r.sequences) == count and all(len(s.tokens) == len(s.logprobs) > 0 for s in r.sequences)
    )


def calls(w: SimpleNamespace) -> dict[str, Call]:
    def service() -> Any:
        return w.service

    def training() -> Any:
        return w.training

    def sampling() -> Any:
        return w.sampling

    def rest() -> Any:
        return w.rest

    def admin() -> Any:
        return tinker.AdminClient()

    adam = types.AdamParams(learning_rate=1e-3)
    now = datetime.now(UTC)
    hours = args(now - timedelta(hours=2), now)
    checkpoint = "weights/program"
    return {
        "ServiceClient.get_server_capabilities": Call(
            service, args, lambda r: BASE_MODEL in [m.model_name for m in r.supported_models]
        ),
        "ServiceClient.create_lora_training_client": Call(
            service, lambda: args(BASE_MODEL, rank=2), lambda r: r.get_info().model_data.model_name
        ),
        "ServiceClient.create_training_client_from_state": Call(
            service, lambda: args(w.state), lambda r: r.get_info().model_data.model_name
        ),
        "ServiceClient.create_training_client_from_state_with_optimizer": Call(
            service, lambda: args(w.state), lambda r: r.get_info().model_data.model_name
        ),
        "ServiceClient.create_sampling_client": Call(service, lambda: args(base_model=BASE_MODEL)),
        "ServiceClient.create_rest_client": Call(service, args),
        "ServiceClient.create_custom_loss": Call(
            service,
            lambda: args(per_datum_loss, {"logprobs": 1, "weights": 1}),
            partial(runs_on_the_server, w),
        ),
        "ServiceClient.copy_weights": Call(
            service, lambda: args(w.state), lambda r: r.startswith("tinker://")
        ),
        "TrainingClient.get_info": Call(
            training, args, lambda r: r.model_data.model_name == BASE_MODEL
        ),
        "TrainingClient.get_tokenizer": Call(training, args, lambda r: r.encode("abc")),
        "TrainingClient.forward": Call(training, lambda: args(w.data, "cross_entropy"), scored(2)),
        "TrainingClient.forward_backward": Call(
            training, lambda: args(w.data, "cross_entropy"), scored(2)
        ),
        "TrainingClient.forward_backward_custom": Call(
            training, lambda: args(w.data, sum_of_logprobs), lambda r: len(r.loss_fn_outputs) == 2
        ),
        "TrainingClient.optim_step": Call(training, lambda: args(adam), lambda r: r.metrics),
        "TrainingClient.save_state": Call(training, lambda: args(w.name()), lambda r: r.path),
        "TrainingClient.load_state": Call(training, lambda: args(w.state)),
        "TrainingClient.load_state_with_optimizer": Call(training, lambda: args(w.state)),
        "TrainingClient.save_weights_for_sampler": Call(
            training, lambda: args(w.name()), lambda r: "/sampler_weights/" in r.path
        ),
        "TrainingClient.save_weights_and_get_sampling_client": Call(
            training, args, lambda r: resolve(r.sample(w.prompt, 1, w.params))
        ),
        "TrainingClient.save_weights_and_get_sampling_client_submit": Call(
            training, args, lambda r: resolve(r.sample(w.prompt, 1, w.params))
        ),
        "TrainingClient.create_sampling_client": Call(
            training, lambda: args(w.weights), lambda r: resolve(r.sample(w.prompt, 1, w.params))
        ),
        "SamplingClient.sample": Call(
            sampling, lambda: args(w.prompt, 2, w.params), sampled(count=2)
        ),
        "SamplingClient.compute_logprobs": Call(
            sampling,
            lambda: args(w.prompt),
            lambda r: r[0] is None and all(value <= 0 for value in r[1:]) and len(r) == len(TOKENS),
        ),
        "SamplingClient.get_tokenizer": Call(sampling, args, lambda r: r.encode("abc")),
        "SamplingClient.get_base_model": Call(sampling, args, lambda r: r == BASE_MODEL),
        "SamplingClient.get_sampler_handle": Call(sampling, args, bool),
        "SamplingClient.from_sampler_handle": Call(
            sampling,
            lambda: args(w.sampling.get_sampler_handle()),
            lambda r: sampled()(resolve(r.sample(w.prompt, 1, w.params))),
        ),
        "RestClient.get_server_capabilities": Call(rest, args, lambda r: r.supported_models),
        "RestClient.get_training_run": Call(
            rest, lambda: args(w.run_id), lambda r: r.base_model == BASE_MODEL
        ),
        "RestClient.get_training_run_by_tinker_path": Call(
            rest, lambda: args(w.state), lambda r: r.training_run_id == w.run_id
        ),
        "RestClient.get_weights_info_by_tinker_path": Call(
            rest, lambda: args(w.state), lambda r: r.lora_rank == 4
        ),
        "RestClient.list_training_runs": Call(
            rest, lambda: args(limit=5), lambda r: r.training_runs
        ),
        "RestClient.list_checkpoints": Call(rest, lambda: args(w.run_id), lambda r: r.checkpoints),
        "RestClient.list_user_checkpoints": Call(rest, args, lambda r: r.checkpoints),
        "RestClient.get_session": Call(
            rest, lambda: args(w.session_id), lambda r: w.run_id in r.training_run_ids
        ),
        "RestClient.list_sessions": Call(rest, args, lambda r: r.sessions),
        "RestClient.search_sessions": Call(
            rest, lambda: args(session_search(w.session_id)), lambda r: r.sessions
        ),
        "RestClient.get_sampler": Call(
            rest,
            lambda: args(first_sampler(w)),
            lambda r: r.base_model == BASE_MODEL,
        ),
        "RestClient.publish_checkpoint_from_tinker_path": Call(rest, lambda: args(w.state)),
        "RestClient.unpublish_checkpoint_from_tinker_path": Call(rest, lambda: args(w.state)),
        "RestClient.set_checkpoint_ttl_from_tinker_path": Call(rest, lambda: args(w.state, 7200)),
        "RestClient.get_checkpoint_archive_url": Call(
            rest, lambda: args(w.run_id, checkpoint), lambda r: r.url
        ),
        "RestClient.get_checkpoint_archive_url_from_tinker_path": Call(
            rest, lambda: args(w.state), lambda r: r.url
        ),
        "RestClient.copy_weights": Call(
            rest, lambda: args(w.state, "project"), lambda r: r.startswith("tinker://")
        ),
        "RestClient.assign_session_project": Call(rest, lambda: args(w.session_id, "project")),
        "RestClient.export_session_trace": Call(
            rest, lambda: args(w.session_id), lambda url: url.startswith("http")
        ),
        "RestClient.whoami": Call(lambda: Whoami(w.rest), args, lambda r: r.user_urn),
        "RestClient.get_audit_log": Call(rest, args),
        "RestClient.get_billing_usage": Call(rest, lambda: hours),
        "RestClient.get_current_checkpoint_storage_usage": Call(rest, args),
        "AdminClient.get_audit_log": Call(admin, args),
        "AdminClient.get_billing_usage": Call(admin, lambda: hours),
        "AdminClient.get_current_checkpoint_storage_usage": Call(admin, args),
        "RestClient.delete_checkpoint": Call(
            rest, lambda: args(w.run_id, "weights/" + w.new_state().rpartition("/")[2])
        ),
        "RestClient.delete_checkpoint_from_tinker_path": Call(rest, lambda: args(w.new_state())),
        "TrainingClient.save_weights_external": Call(
            training, lambda: args(w.name()), lambda r: "/external_weights/" in r.path
        ),
        "RestClient.get_external_weights_urls": Call(
            rest,
            lambda: args(resolve(w.training.save_weights_external(w.name())).path),
            lambda r: r.urls,
        ),
        "ServiceClient.close": Call(service, lambda: args("success")),
    }


def session_search(session_id: str) -> Any:
    return types.SessionSearchRequest(session_id=session_id, owner={"type": "own"})


def first_sampler(w: SimpleNamespace) -> str:
    return str(resolve(w.rest.get_session(w.session_id)).sampler_ids[0])


# --- features -------------------------------------------------------------------------------------


def has(method: Any, *parameters: str) -> None:
    """Absent unless the method takes all of these."""
    if not set(parameters) <= set(inspect.signature(method).parameters):
        raise Absent


def many_chunks(w: SimpleNamespace) -> None:
    data = [make_datum(TOKENS[: 2 + index % 4]) for index in range(300)]
    output = resolve(w.training.forward_backward(data, "cross_entropy"))
    assert [len(o["logprobs"].data) for o in output.loss_fn_outputs] == [
        2 + index % 4 for index in range(300)
    ]


def two_targets(w: SimpleNamespace) -> None:
    inputs = {"target_tokens": tensor([[6, 7], [7, 8]]), "weights": tensor([[0.5, 0.5], [1.0, 0]])}
    datum = types.Datum(model_input=types.ModelInput.from_ints([5, 6]), loss_fn_inputs=inputs)
    output = resolve(w.training.forward_backward([datum], "cross_entropy"))
    assert len(output.loss_fn_outputs[0]["logprobs"].data) == 4


def bad_datum(w: SimpleNamespace) -> None:
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([5, 6]),
        loss_fn_inputs={"target_tokens": tensor([6]), "weights": tensor([1.0])},
    )
    message = ""
    try:
        resolve(w.training.forward([datum], "cross_entropy"))
    except tinker.TinkerError as error:
        message = str(error)
    assert "target_tokens" in message, message
    assert resolve(w.training.forward(w.data, "cross_entropy")).loss_fn_outputs


def prompt_logprobs(w: SimpleNamespace) -> None:
    has(w.sampling.sample, "include_prompt_logprobs")
    response = resolve(w.sampling.sample(w.prompt, 1, w.params, include_prompt_logprobs=True))
    assert response.prompt_logprobs[0] is None
    assert len(response.prompt_logprobs) == len(TOKENS)


def topk_prompt_logprobs(w: SimpleNamespace) -> None:
    has(w.sampling.sample, "topk_prompt_logprobs")
    response = resolve(
        w.sampling.sample(
            w.prompt, 1, w.params, include_prompt_logprobs=True, topk_prompt_logprobs=2
        )
    )
    rows = response.topk_prompt_logprobs
    assert rows[0] is None
    assert [len(row) for row in rows[1:]] == [2] * (len(TOKENS) - 1)


def topk_sample_logprobs(w: SimpleNamespace) -> None:
    has(w.sampling.sample, "topk_sample_logprobs")
    response = resolve(w.sampling.sample(w.prompt, 1, w.params, topk_sample_logprobs=2))
    assert [len(row) for row in response.sequences[0].topk_logprobs] == [2] * 3


def stops(w: SimpleNamespace) -> None:
    free = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    tokens = list(resolve(w.sampling.sample(w.prompt, 1, free)).sequences[0].tokens)
    assert len(tokens) == 4
    stopped = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[tokens[1]])
    sequence = resolve(w.sampling.sample(w.prompt, 1, stopped)).sequences[0]
    assert list(sequence.tokens) == tokens[: tokens.index(tokens[1]) + 1]
    assert sequence.stop_reason == "stop"


def dimuon(w: SimpleNamespace) -> None:
    has(w.service.create_lora_training_client, "optimizer")
    resolve(
        w.service.create_lora_training_client(
            BASE_MODEL, rank=2, optimizer=types.DimuonOptimizerConfig()
        )
    )


def age_encryption(w: SimpleNamespace) -> None:
    if not hasattr(w.training, "save_weights_external"):
        raise Absent
    has(w.training.save_weights_external, "age_encryption_recipients")
    run = resolve(w.service.create_lora_training_client(BASE_MODEL, rank=2))
    resolve(run.save_weights_external(w.name(), age_encryption_recipients=["age1x"]))


def losses(w: SimpleNamespace) -> None:
    inputs = {"target_tokens": tensor(TOKENS), "logprobs": tensor([-1.0] * 6)}
    inputs |= {"advantages": tensor([1.0] * 6)}
    datum = types.Datum(model_input=w.prompt, loss_fn_inputs=inputs)
    for name in set(get_args(types.LossFnType)) - {"cross_entropy", "stable_reinforce", "custom"}:
        assert scored(1)(resolve(w.training.forward_backward([datum], name))), name


def stable_reinforce(w: SimpleNamespace) -> None:
    if "stable_reinforce" not in get_args(types.LossFnType):
        raise Absent
    resolve(w.training.forward_backward(w.data, "stable_reinforce"))


def forward_chunk(w: SimpleNamespace, chunk: Any) -> None:
    """Scores a prompt of this one chunk, which stands for two tokens.

    In a run of its own: a release that cannot send a chunk has counted the request all the same,
    and later requests of the run would wait for it.
    """
    run = resolve(w.service.create_lora_training_client(BASE_MODEL, rank=2))
    datum = types.Datum(
        model_input=types.ModelInput(chunks=[chunk]),
        loss_fn_inputs={"target_tokens": tensor([6, 7]), "weights": tensor([1.0, 1.0])},
    )
    try:
        resolve(run.forward([datum], "cross_entropy"))
    except ValueError as error:
        raise Absent from error  # the SDK has the type, and no way to send it


def sizes(chunk: Any) -> dict[str, int]:
    """How releases say that a chunk stands for two tokens."""
    wanted = {"expected_tokens": 2, "height": 1, "width": 1, "tokens": 2}
    fields = inspect.signature(chunk).parameters
    return {name: value for name, value in wanted.items() if name in fields}


def image(w: SimpleNamespace) -> None:
    chunk = types.ImageChunk
    forward_chunk(w, chunk(data=b"x", format="png", **sizes(chunk)))


def image_asset_pointer(w: SimpleNamespace) -> None:
    chunk = types.ImageAssetPointerChunk
    forward_chunk(w, chunk(location="tinker://x", format="png", **sizes(chunk)))


def audio(w: SimpleNamespace) -> None:
    chunk = getattr(types, "DmelChunk", None)
    if chunk is None:
        raise Absent
    forward_chunk(w, chunk(dmel=b"\0\1\2"))  # a header only: float32, one dimension, of two


FEATURES: dict[str, Callable[[SimpleNamespace], None]] = {
    "feature: 300 datums, in chunks": many_chunks,
    "feature: two targets per position": two_targets,
    "feature: a bad datum fails its future only": bad_datum,
    "feature: prompt logprobs": prompt_logprobs,
    "feature: top-k prompt logprobs": topk_prompt_logprobs,
    "feature: top-k sample logprobs": topk_sample_logprobs,
    "feature: stop tokens": stops,
    "feature: every loss function": losses,
    "feature: stable_reinforce": stable_reinforce,
    "feature: dimuon": dimuon,
    "feature: age encryption": age_encryption,
    "feature: image": image,
    "feature: image asset pointer": image_asset_pointer,
    "feature: audio": audio,
}


# --- running --------------------------------------------------------------------------------------


def public_methods() -> Iterator[str]:
    """`Class.method` of this release; an async twin belongs to its method."""
    for name, module in CLASSES.items():
        try:
            found = getattr(import_module(f"tinker.lib.public_interfaces.{module}"), name)
        except ImportError:
            continue
        for method in dir(found):
            if method.startswith("_") or {method, f"{name}.{method}"} & LOCAL:
                continue
            if not (method.endswith("_async") and hasattr(found, method.removesuffix("_async"))):
                yield f"{name}.{method}"


def outcome(name: str, run: Callable[[], object]) -> dict[str, str]:
    try:
        run()
    except Absent:
        return {"name": name, "state": "absent", "reason": ""}
    except Exception as error:
        if name in REFUSED and is_refusal(error, REFUSED[name].says):
            return {"name": name, "state": "refused", "reason": REFUSED[name].reason}
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        return {"name": name, "state": "fails", "reason": reason}
    return {"name": name, "state": "works", "reason": ""}


def is_refusal(error: Exception, says: str) -> bool:
    """A 4xx, or a failed future whose fault is the user's, with the sentence that is expected."""
    status = getattr(error, "status_code", None)
    category = str(getattr(error, "category", "")).lower().rpartition(".")[2]
    refused = 400 <= status < 500 if status is not None else category == "user"
    return refused and says in str(error)


def main() -> int:
    world = make_world()
    methods = set(public_methods())
    plan: dict[str, Callable[[], object]] = {
        name: partial(invoke, name, call) for name, call in calls(world).items()
    }
    features = {name: partial(feature, world) for name, feature in FEATURES.items()}
    plan = {**features, **plan}  # the last call of all ends the session
    for name, run in plan.items():
        if name in methods or name in FEATURES:
            row = outcome(name, run)
        else:
            row = {"name": name, "state": "absent", "reason": ""}
        print(json.dumps(row), flush=True)
    for name in sorted(methods - set(plan)):
        row = {"name": name, "state": "fails", "reason": "this program does not call it"}
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
