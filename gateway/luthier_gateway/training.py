"""Training requests that are JSON in every SDK: create_model, optim_step, save and load."""

from typing import Any

import orjson
from aiohttp import web

from luthier_core.errors import (
    BadRequest,
    InvalidField,
    LuthierError,
    NotFound,
    Unsupported,
)
from luthier_core.loss_graph import loss_id_of, parse_loss_graph
from luthier_core.ops import Kind
from luthier_core.records import RunRecord
from luthier_core.types import (
    CreateCustomLoss,
    CreateModel,
    LoadWeights,
    ModelId,
    OptimStep,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
    WireModel,
    check,
    parse,
    read_object,
)
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.futures import LOSS_FUTURE
from luthier_gateway.submit import (
    ids_of,
    json_digest,
    read_training_body,
    reject_creation,
    submit,
    submit_creation,
)
from luthier_gateway.web_io import json_response, read_body

MAX_JSON_BODY = 4 * 1024 * 1024


async def create_model(request: web.Request) -> web.Response:
    """A new run. What is wrong with it fails its future; an unknown session is a 404."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    value = read_object(await read_body(request, MAX_JSON_BODY))
    wanted: CreateModel | None = None
    problem: LuthierError | None = None
    try:
        wanted = check(CreateModel, value)
        wanted.refuse_unsupported()
        _check_creation(backends, wanted)
    except BadRequest as error:
        problem = error
    if problem is None and wanted is not None:
        run = await backends.registry.create_run(
            tenant,
            session_id=wanted.session_id,
            model_seq_id=wanted.model_seq_id,
            base_model=wanted.base_model,
            lora_config=wanted.lora_config.model_dump(),
            optimizer_config=wanted.optimizer_config.model_dump(),
            user_metadata=_as_strings(wanted.user_metadata),
        )
        return await _create(backends, tenant, run, digest=json_digest(value), source=None)
    run_id = await _run_id_of(backends, tenant, value)
    assert problem is not None
    return await reject_creation(
        backends, tenant, run_id, digest=json_digest(value), problem=problem
    )


async def get_info(request: web.Request) -> web.Response:
    backends = request.app[BACKENDS]
    wanted = parse(ModelId, await read_body(request, MAX_JSON_BODY))
    run = await backends.live_run(request[TENANT], wanted.model_id)
    facts = run.facts
    return json_response(
        {
            "type": "get_info",
            "model_data": {
                "arch": facts["architecture"],
                "model_name": run.base_model,
                "tokenizer_id": facts["tokenizer_id"],
            },
            "model_id": wanted.model_id,
            "is_lora": True,
            "lora_rank": facts["lora_rank"],
            "model_name": run.base_model,
            "optimizer_config": {"type": "adamw"},
        }
    )


async def optim_step(request: web.Request) -> web.Response:
    return await _submit_json(request, OptimStep, Kind.OPTIM_STEP)


async def save_weights(request: web.Request) -> web.Response:
    return await _submit_json(request, SaveWeights, Kind.SAVE_WEIGHTS)


async def save_weights_for_sampler(request: web.Request) -> web.Response:
    return await _submit_json(request, SaveWeightsForSampler, Kind.SAVE_WEIGHTS_FOR_SAMPLER)


async def save_weights_external(request: web.Request) -> web.Response:
    return await _submit_json(request, SaveWeightsExternal, Kind.SAVE_WEIGHTS_EXTERNAL)


async def load_weights(request: web.Request) -> web.Response:
    """Into a run as an ordinary op, or as the creation of a new run from a checkpoint."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    value = await read_training_body(request, MAX_JSON_BODY, read_object, Kind.LOAD_WEIGHTS)
    if isinstance(value, web.Response):
        return value
    if value.get("model_id") is not None:
        return await _load_into_run(backends, tenant, value)
    try:
        wanted = check(LoadWeights, value)
        wanted.refuse_unsupported()
        access = await backends.access_tenant(wanted.weights_access_token)
        source = await backends.registry.resolve(tenant, wanted.path, access_tenant=access)
        run = await backends.registry.create_run(
            tenant,
            session_id=wanted.session_id or "",
            model_seq_id=wanted.model_seq_id or 0,
            base_model=wanted.base_model,
            user_metadata=_as_strings(wanted.user_metadata),
            source_path=wanted.path,
            access_tenant=access,
        )
    except (BadRequest, NotFound) as error:
        run_id = await _run_id_of(backends, tenant, value)
        return await reject_creation(
            backends, tenant, run_id, digest=json_digest(value), problem=error
        )
    loaded = {
        "path": wanted.path,
        "manifest": source.manifest_key,
        "optimizer": wanted.optimizer,
    }
    return await _create(backends, tenant, run, digest=json_digest(value), source=loaded)


async def _load_into_run(backends: Backends, tenant: str, value: dict[str, Any]) -> web.Response:
    run_id, seq = ids_of(value)
    run = await backends.working_run(tenant, run_id, seq)
    problem: LuthierError | None = None
    body = b""
    try:
        wanted = check(LoadWeights, value)
        wanted.refuse_unsupported()
        access = await backends.access_tenant(wanted.weights_access_token)
        source = await backends.registry.resolve(tenant, wanted.path, access_tenant=access)
        # The log names the checkpoint by its manifest, so replay loads the same bytes even if the
        # name has been given to another checkpoint since.
        body = orjson.dumps(
            {
                "path": wanted.path,
                "manifest": source.manifest_key,
                "optimizer": wanted.optimizer,
            }
        )
    except (BadRequest, NotFound) as error:
        problem = error
    return await submit(
        backends,
        tenant,
        run_id,
        seq,
        kind=Kind.LOAD_WEIGHTS,
        body=body,
        digest=json_digest(value),
        base_model=run.base_model,
        problem=problem,
    )


async def create_custom_loss(request: web.Request) -> web.Response:
    """Checks a graph; its id holds all of it, so the future that is answered needs no record."""
    backends = request.app[BACKENDS]
    if not backends.config.limits.custom_losses:
        raise Unsupported(
            "create_custom_loss: this server runs no uploaded loss; forward_backward_custom "
            "computes it in the client"
        )
    wanted = parse(CreateCustomLoss, await read_body(request, MAX_JSON_BODY))
    session = await backends.registry.heartbeat(request[TENANT], wanted.session_id)
    if session.status != "active":
        raise BadRequest(f"session {wanted.session_id} is finished")
    parse_loss_graph(wanted.inputs, wanted.graph)
    request_id = LOSS_FUTURE + loss_id_of(wanted.inputs, wanted.graph)
    return json_response({"request_id": request_id, "model_id": None})


async def _submit_json(request: web.Request, model: type[WireModel], kind: Kind) -> web.Response:
    backends, tenant = request.app[BACKENDS], request[TENANT]
    value = await read_training_body(request, MAX_JSON_BODY, read_object, kind)
    if isinstance(value, web.Response):
        return value
    run_id, seq = ids_of(value)
    run = await backends.working_run(tenant, run_id, seq)
    problem: LuthierError | None = None
    body = b""
    try:
        wanted = check(model, value)
        wanted.refuse_unsupported()
        body = wanted.to_json()
    except BadRequest as error:
        problem = error
    return await submit(
        backends,
        tenant,
        run_id,
        seq,
        kind=kind,
        body=body,
        digest=json_digest(value),
        base_model=run.base_model,
        problem=problem,
    )


async def _create(
    backends: Backends, tenant: str, run: RunRecord, *, digest: str, source: dict[str, Any] | None
) -> web.Response:
    model = await backends.model_facts(run.base_model)
    facts = {
        "session_id": run.session_id,
        "vocab_size": model["vocab_size"],
        "max_context_tokens": model["max_context_tokens"],
        "architecture": model["architecture"],
        "tokenizer_id": model["tokenizer_id"],
        "lora_rank": run.lora.rank,
    }
    body = orjson.dumps({"run": run.model_dump(mode="json"), "source": source})
    return await submit_creation(
        backends, tenant, run.run_id, run.base_model, body=body, digest=digest, facts=facts
    )


def _as_strings(metadata: dict[str, Any]) -> dict[str, str]:
    """A training run's metadata: values are strings on the wire, whatever the client gave."""
    return {
        name: value if isinstance(value, str) else orjson.dumps(value).decode()
        for name, value in metadata.items()
    }


def _check_creation(backends: Backends, wanted: CreateModel) -> None:
    names = backends.config.model_names
    if wanted.base_model not in names:
        raise InvalidField(
            f"base_model: {wanted.base_model!r} is not served here; there are {names}"
        )
    most = backends.config.limits.max_rank
    if wanted.lora_config.rank > most:
        raise InvalidField(f"lora_config.rank: {wanted.lora_config.rank}; allowed are 1 to {most}")


async def _run_id_of(backends: Backends, tenant: str, value: dict[str, Any]) -> str:
    """The id of the run that a refused creation asked for; its session must be the tenant's."""
    session_id, index = value.get("session_id"), value.get("model_seq_id")
    if not isinstance(session_id, str) or type(index) is not int or index < 0:
        raise InvalidField("session_id must be a string and model_seq_id an integer from 0")
    await backends.registry.get_session(tenant, session_id)
    return f"{session_id}:train:{index}"
