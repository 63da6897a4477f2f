"""The OpenAPI 3.1 description of the API, from the route table, the handlers and the wire types."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from luthier_core import admin_types, answers, rest_types, types
from luthier_gateway import (
    admin,
    checkpoints,
    files,
    forward_backward,
    futures,
    health,
    moves,
    queues,
    rest,
    sampling,
    sessions,
    training,
    uploads,
    usage,
)
from luthier_gateway.web_io import MAX_PAGE

DESCRIPTION = web.AppKey("openapi", bytes)
PROTOBUF = "application/x-protobuf"

_PARAMETER = re.compile(r"\{(\w+)(?::([^}]*))?\}")
_NO_WORD = re.compile(r"\W+")
_REFERENCE = "#/components/schemas/{model}"
_BINARY_TYPES = {"protobuf": PROTOBUF, "file": "application/octet-stream"}
_BINARY = {"type": "string", "format": "binary"}

_QUERY: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
    "offset": {"type": "integer", "minimum": 0, "maximum": 2**31},
    "access_scope": {"type": "string", "enum": list(rest.ACCESS_SCOPES)},
    "project_id": {"type": "string"},
    "event_type": {
        "type": "string",
        "enum": ["all", "checkpoints", "projects", "teams", "organizations"],
    },
    "day": {"type": "string", "format": "date"},
    "starting_on": {"type": "string", "format": "date-time"},
    "ending_before": {"type": "string", "format": "date-time"},
    "by": {"type": "string", "enum": ["run", "session", "key", "project"]},
    "format": {"type": "string", "enum": ["json", "csv"]},
    "after": {"type": "integer", "minimum": -1},
}
_PAGE = ("limit", "offset")


@dataclass(frozen=True, slots=True)
class Operation:
    """What the description says about a handler beside the first line of its docstring."""

    body: type[BaseModel] | Literal["protobuf", "file"] | None = None
    answer: type[BaseModel] | Literal["any"] | None = answers.Empty
    """None: always refused."""
    query: tuple[str, ...] = ()
    redirects: bool = False


class ForwardBody(BaseModel):
    """JSON of SDKs up to 0.24.1; forward_backward takes the same as `forward_backward_input`."""

    model_id: str
    seq_id: types.SeqId
    forward_input: types.ForwardBackwardInput


async def get_openapi(request: web.Request) -> web.Response:
    """This description."""
    return web.Response(body=request.app[DESCRIPTION], content_type="application/json")


OPERATIONS: dict[Handler, Operation] = {
    get_openapi: Operation(answer="any"),
    health.healthz: Operation(answer=answers.Health),
    sessions.client_config: Operation(answer=answers.ClientConfig),
    sessions.dynamic_config: Operation(answer=answers.ClientConfig),
    sessions.create_session: Operation(types.CreateSession, answers.CreatedSession),
    sessions.session_heartbeat: Operation(types.SessionHeartbeat),
    sessions.finish_session: Operation(types.FinishSession),
    sessions.telemetry: Operation(answer=answers.TelemetryAccepted),
    sessions.get_server_capabilities: Operation(answer=answers.ServerCapabilities),
    training.create_model: Operation(types.CreateModel, answers.UntypedFuture),
    training.get_info: Operation(types.ModelId, answers.ModelInfo),
    forward_backward.forward_backward: Operation("protobuf", answers.UntypedFuture),
    forward_backward.forward: Operation(ForwardBody, answers.UntypedFuture),
    training.optim_step: Operation(types.OptimStep, answers.UntypedFuture),
    training.save_weights: Operation(types.SaveWeights, answers.UntypedFuture),
    training.save_weights_for_sampler: Operation(
        types.SaveWeightsForSampler, answers.UntypedFuture
    ),
    training.save_weights_external: Operation(types.SaveWeightsExternal, answers.UntypedFuture),
    training.load_weights: Operation(types.LoadWeights, answers.UntypedFuture),
    training.create_custom_loss: Operation(types.CreateCustomLoss, answers.UntypedFuture),
    sampling.create_sampling_session: Operation(
        types.CreateSamplingSession, answers.CreatedSamplingSession
    ),
    sampling.join_sampling_session: Operation(
        types.JoinSamplingSession, answers.JoinedSamplingSession
    ),
    sampling.asample: Operation(types.Sample, answers.UntypedFuture),
    futures.retrieve_future: Operation(types.RetrieveFuture, "any"),
    futures.retrieve_futures: Operation(types.RetrieveFutures, "any"),
    futures.cancel_future: Operation(types.CancelFuture),
    futures.future_status: Operation(answer="any"),
    checkpoints.weights_info: Operation(types.TinkerPath, answers.WeightsInfo),
    checkpoints.copy_weights: Operation(rest_types.CopyWeights, answers.CopiedWeights),
    uploads.create_upload: Operation(rest_types.CreateUpload, answers.CreatedUpload),
    uploads.put_upload: Operation("file", answers.UploadedCheckpoint),
    checkpoints.list_run_checkpoints: Operation(answer=answers.Checkpoints),
    checkpoints.list_checkpoints: Operation(answer=answers.Checkpoints, query=_PAGE),
    checkpoints.delete_checkpoint: Operation(),
    checkpoints.publish_checkpoint: Operation(),
    checkpoints.unpublish_checkpoint: Operation(),
    checkpoints.get_keep_last: Operation(answer=answers.KeepLast),
    checkpoints.set_keep_last: Operation(rest_types.SetKeepLast),
    checkpoints.set_checkpoint_ttl: Operation(rest_types.SetTtl),
    checkpoints.get_checkpoint_archive: Operation(answer=answers.ArchiveUrl, redirects=True),
    checkpoints.get_external_weights_urls: Operation(answer=answers.ExternalWeightsUrls),
    rest.get_sampler: Operation(answer=answers.SamplerInfo),
    rest.list_training_runs: Operation(
        answer=answers.TrainingRuns, query=(*_PAGE, "access_scope", "project_id")
    ),
    rest.get_training_run: Operation(answer=answers.TrainingRun, query=("access_scope",)),
    rest.list_sessions: Operation(answer=answers.Sessions, query=(*_PAGE, "access_scope")),
    rest.get_session: Operation(answer=answers.Session, query=("access_scope",)),
    rest.search_sessions: Operation(rest_types.SearchSessions, answers.FoundSessions),
    rest.set_session_project: Operation(rest_types.SetProject),
    rest.get_own_key: Operation(answer=answers.OwnKey),
    rest.revoke_own_key: Operation(),
    rest.export_trace: Operation(answer=answers.TraceExport),
    rest.get_audit: Operation(answer=admin_types.AuditEntries, query=("event_type", "day")),
    usage.usage_events: Operation(
        answer=admin_types.UsageEvents, query=("starting_on", "ending_before")
    ),
    usage.stored_checkpoints: Operation(
        answer=admin_types.StoredCheckpoints, query=("project_id",)
    ),
    usage.run_metrics: Operation(answer=admin_types.RunMetrics, query=("after", "limit")),
    usage.org_usage: Operation(
        answer="any", query=("starting_on", "ending_before", "by", "format")
    ),
    queues.list_queues: Operation(answer=admin_types.Queues),
    queues.session_queue: Operation(answer=admin_types.SessionQueue),
    queues.cancel_queued: Operation(answer=admin_types.CancelledQueue),
    moves.move_run: Operation(admin_types.MoveRun, admin_types.MovedRun),
    moves.drain: Operation(answer=admin_types.Drained),
    moves.undrain: Operation(answer=admin_types.Drained),
    usage.list_jobs: Operation(answer=admin_types.Jobs),
    usage.run_job: Operation(answer="any"),
    rest.refuse_key_exchange: Operation(answer=None),
    admin.list_orgs: Operation(answer=admin_types.Orgs),
    admin.create_org: Operation(admin_types.CreateOrg, admin_types.Org),
    admin.get_org: Operation(answer=admin_types.Org),
    admin.update_org: Operation(admin_types.UpdateOrg, admin_types.Org),
    admin.list_projects: Operation(answer=admin_types.Projects),
    admin.create_project: Operation(admin_types.CreateProject, admin_types.Project),
    admin.list_users: Operation(answer=admin_types.Users),
    admin.create_user: Operation(admin_types.CreateUser, admin_types.User),
    admin.delete_user: Operation(answer="any"),
    admin.list_keys: Operation(answer=admin_types.Keys),
    admin.create_key: Operation(admin_types.CreateKey, admin_types.NewKey),
    admin.revoke_key: Operation(answer=admin_types.Key),
    admin.check_audit: Operation(answer=admin_types.AuditCheck),
}


def describe(
    routes: Iterable[web.RouteDef], *, prefix: str, open_paths: Iterable[str]
) -> dict[str, Any]:
    """The description of every route below `prefix` but the signed links, which are opaque."""
    models: set[type[BaseModel]] = {answers.Error, answers.TryAgain}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not route.path.startswith(prefix) or route.path.startswith(files.PREFIX):
            continue
        operation = OPERATIONS[route.handler]
        models |= {m for m in (operation.body, operation.answer) if isinstance(m, type)}
        described = _operation(route, operation)
        if route.path in open_paths:
            described["security"] = []
        path = _PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = described
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(model, "validation") for model in ordered], ref_template=_REFERENCE
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Luthier", "version": version("luthier")},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{"key": []}],
    }


def _operation(route: web.RouteDef, operation: Operation) -> dict[str, Any]:
    name = getattr(route.handler, "__name__", "")
    documentation = (route.handler.__doc__ or name.replace("_", " ")).strip()
    described: dict[str, Any] = {
        "operationId": _NO_WORD.sub("_", f"{route.method.lower()}{route.path}").strip("_"),
        "summary": documentation.partition("\n")[0],
        "responses": _responses(route, operation),
    }
    parameters = [_path_parameter(*found) for found in _PARAMETER.findall(route.path)]
    parameters += [
        {"name": name, "in": "query", "schema": _QUERY[name]} for name in operation.query
    ]
    if parameters:
        described["parameters"] = parameters
    if isinstance(operation.body, str):
        described["requestBody"] = _content(_BINARY_TYPES[operation.body], _BINARY)
    elif operation.body is not None:
        described["requestBody"] = _content("application/json", _schema(operation.body))
    return described


def _responses(route: web.RouteDef, operation: Operation) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "4XX": {
            "description": "Refused.",
            **_content("application/json", _schema(answers.Error)),
        },
    }
    if operation.answer is not None:
        good = {} if operation.answer == "any" else _schema(operation.answer)
        responses["200"] = {"description": "Done.", **_content("application/json", good)}
    if operation.redirects:
        responses["302"] = {"description": "The link, in Location."}
    if route.handler is futures.retrieve_future:
        responses["200"]["content"][PROTOBUF] = {"schema": _BINARY}
        responses["408"] = {
            "description": "Nothing yet.",
            **_content("application/json", _schema(answers.TryAgain)),
        }
    return responses


def _path_parameter(name: str, pattern: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if pattern:
        schema["enum"] = pattern.split("|")
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema}}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
