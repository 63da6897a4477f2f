"""Sampling requests: create_sampling_session, asample."""

from aiohttp import web

from luthier_core import keys, tracing
from luthier_core.errors import BadRequest, InvalidField, LuthierError, NotFound, TooManyRequests
from luthier_core.failpoints import failpoint
from luthier_core.ops import INLINE_LIMIT, Body, Outcome
from luthier_core.records import SamplerRecord
from luthier_core.types import (
    CreateSamplingSession,
    JoinSamplingSession,
    Sample,
    check,
    parse,
    read_object,
)
from luthier_core.validation import check_sample
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.submit import json_digest, off_loop_if_large
from luthier_gateway.web_io import json_response, read_body


async def create_sampling_session(request: web.Request) -> web.Response:
    """Binds a base model, or saved weights, to an id; a repeat gets the same id."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    wanted = parse(CreateSamplingSession, await read_body(request, 1024 * 1024))
    sampler = await backends.registry.create_sampler(
        tenant,
        session_id=wanted.session_id,
        sampling_session_seq_id=wanted.sampling_session_seq_id,
        base_model=wanted.base_model,
        model_path=wanted.model_path,
    )
    return json_response({"sampling_session_id": sampler.sampling_session_id})


async def join_sampling_session(request: web.Request) -> web.Response:
    """A number for one more handle of the session, which keeps its seqs apart from the others'."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    wanted = parse(JoinSamplingSession, await read_body(request, 1024 * 1024))
    sampler = await backends.sampler(tenant, wanted.sampling_session_id)
    number = await backends.oplog.join(
        sampler.sampling_session_id, request.headers.get("X-Idempotency-Key")
    )
    return json_response({"client_counter": number})


async def asample(request: web.Request) -> web.Response:
    """Queue one sampling request. A bad one fails its future; 429 is the only overload signal."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    raw = await read_body(request, backends.config.gateway.max_body_bytes)
    value = await off_loop_if_large(len(raw), read_object, raw)
    session, seq = value.get("sampling_session_id"), value.get("seq_id")
    if not isinstance(session, str) or type(seq) is not int or not 0 <= seq < 2**63:
        raise InvalidField("sampling_session_id must be a string and seq_id an integer from 0")
    sampler = await backends.sampler(tenant, session)
    await backends.check_sampling(sampler, seq)
    limits = await backends.limits(sampler.base_model)
    problem: LuthierError | None = None
    body, num_samples = b"", value.get("num_samples") or 1
    try:
        wanted = await off_loop_if_large(len(raw), check, Sample, value)
        wanted.refuse_unsupported()
        await off_loop_if_large(len(raw), check_sample, wanted, limits)
        body, num_samples = wanted.to_json(), wanted.num_samples
    except BadRequest as error:
        problem = error
        # No sequences will come; the SDK wants one id per sequence it asked for.
        num_samples = num_samples if type(num_samples) is int else 1
        num_samples = min(max(num_samples, 1), limits.max_num_samples)
    await failpoint("gw.body", "sample")
    digest = json_digest(value)
    if problem is not None:
        job = Outcome.failure(problem.message, problem.category).fields()
    else:
        stored = await payload(backends, sampler, seq, body, digest)
        job = {
            "session": session,
            "tenant": tenant,
            "weights": sampler.weights,
            "inflight_run": sampler.inflight_run,
            **stored.fields(),
        }
    await failpoint("gw.admit", "sample")
    await enqueue(backends, sampler, str(seq), digest, job)
    backends.accepted_samples.note(sampler, seq, digest)
    await failpoint("gw.reply", "sample")
    request_id = f"{session}:{seq}"
    return json_response(
        {
            "request_id": request_id,
            "sample_sequence_ids": [f"{request_id}:{index}" for index in range(num_samples)],
        }
    )


async def enqueue(
    backends: Backends, sampler: SamplerRecord, seq: str, digest: str, job: dict[str, str | bytes]
) -> None:
    """Queue a job, or what a refused request came to; TooManyRequests if the queue is full."""
    if "state" not in job and (carrier := tracing.carried()):
        job = {**job, "trace": carrier}
    status = await backends.oplog.enqueue(
        tenant=sampler.tenant,
        base_model=sampler.base_model,
        sampling_session_id=sampler.sampling_session_id,
        seq=seq,
        digest=digest,
        job=job,
        max_jobs=backends.config.limits.max_queued_samples,
        header={"base_model": sampler.base_model, "weights": sampler.weights},
    )
    if status == "MISMATCH":
        raise BadRequest(f"seq_id: {seq} was used for a request with another body")
    if status == "NOSESSION":
        raise NotFound(f"sampling_session_id={sampler.sampling_session_id!r}")
    if status == "BUSY":
        raise TooManyRequests(f"the sampling queue of {sampler.base_model} is full")


async def payload(
    backends: Backends, sampler: SamplerRecord, seq: int, body: bytes, digest: str
) -> Body:
    """The request of a job, stored if it is large."""
    if len(body) <= INLINE_LIMIT:
        return Body.of(body)
    key = keys.sample_payload(sampler.tenant, sampler.sampling_session_id, seq, digest)
    await backends.blobs.put(key, body)
    return Body.stored(key, body)
