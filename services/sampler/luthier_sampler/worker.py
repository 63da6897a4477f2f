"""The sampler's control flow: claim jobs, feed the engine, settle each as its request finishes.

Sampling has no order and is executed at least once: a job stays with its claimer until an outcome
is stored, and the first outcome wins. A sampler that starts again takes up the jobs it had claimed;
jobs of one that stays away are claimed by the others.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from luthier_core import keys, tracing
from luthier_core.blobs import Blobs, outlasting_outage
from luthier_core.checkpoints import read_files
from luthier_core.config import SamplerConfig
from luthier_core.errors import LuthierError
from luthier_core.hints import Hints
from luthier_core.lifecycle import WorkerLease
from luthier_core.oplog import REDIS_ERRORS, Oplog
from luthier_core.ops import INLINE_LIMIT, Body, Outcome, SamplingJob
from luthier_core.prompt_targets import PromptTargets
from luthier_core.types import Sample
from luthier_sampler.engine import Engine, Finished
from luthier_sampler.observing import note_finished
from luthier_sampler.sequence import SampleRequest

log = logging.getLogger(__name__)
T = TypeVar("T")

BLOCK_MS = 1000
TOUCH_S = 10.0
RETRY_S = 1.0
DRAIN_S = 10.0
CLAIM_AHEAD = 16
"""Jobs claimed beyond those that can run, so that no step waits for Redis to fill a free place."""
MAX_UNSENT_PARTIALS = 4096
"""Messages about running samples that wait for Redis; more are dropped, as they are hints."""
MAX_DELIVERIES = 3
"""A job that was claimed this often without an outcome is failed: it may be what kills us."""


class Worker:
    """Jobs of one base model. `run(stop)` returns once drained, or when the lease is lost."""

    def __init__(
        self,
        *,
        base_model: str,
        config: SamplerConfig,
        lease: WorkerLease,
        oplog: Oplog,
        blobs: Blobs,
        engine: Engine,
    ) -> None:
        self._base_model = base_model
        self._config = config
        self._lease = lease
        self._oplog = oplog
        self._blobs = blobs
        self._engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._jobs: dict[str, SamplingJob] = {}
        self._began: dict[str, float] = {}
        """Request -> when it was claimed, in seconds since the epoch."""
        self._tasks: set[asyncio.Task[None]] = set()
        """One per job that is being admitted or settled."""
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._hints = Hints(oplog.redis, lambda channel, request_id: self._cancel(request_id))
        self._partials: asyncio.Queue[tuple[str, str]] = asyncio.Queue(MAX_UNSENT_PARTIALS)
        self._adapter_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Of the versions that are being loaded; others go by themselves."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`, then finish what is running, for DRAIN_S at most."""
        await self._oplog.open_jobs(self._base_model)
        async with asyncio.TaskGroup() as group:
            lost = group.create_task(self._lease.keep(self._config.lease_renew_s))
            stepping = group.create_task(self._step_for_ever(group))
            claiming = group.create_task(self._claim_for_ever(group))
            reclaiming = group.create_task(self._reclaim_for_ever(group))
            listening = group.create_task(self._hints.listen())
            telling = group.create_task(self._tell_for_ever())
            await self._hints.subscribe(keys.sampling_cancelled(self._base_model))
            await self._lease.set_state("ready")
            stopped = group.create_task(stop.wait())
            await asyncio.wait({lost, stopped}, return_when=asyncio.FIRST_COMPLETED)
            await self._lease.set_state("draining")
            claiming.cancel()
            reclaiming.cancel()
            await self._drain()
            for task in (stepping, stopped, lost, listening, telling, *self._tasks):
                task.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)
        await self._lease.release()

    # --- claiming ---------------------------------------------------------------------------------

    async def _claim_for_ever(self, group: asyncio.TaskGroup) -> None:
        claimed_own = False
        while True:
            try:
                if not claimed_own:
                    own = await self._oplog.claim_own(self._base_model, self._lease.name)
                    await self._start_again(group, own)
                    claimed_own = True
                room = self._config.max_running + CLAIM_AHEAD - len(self._jobs)
                if room <= 0:
                    self._room.clear()
                    await self._room.wait()
                    continue
                jobs = await self._oplog.claim(
                    self._base_model, self._lease.name, max_jobs=room, block_ms=BLOCK_MS
                )
                self._start(group, jobs)
            except REDIS_ERRORS:
                log.warning("redis is away; claiming again", exc_info=True)
                await asyncio.sleep(RETRY_S)

    async def _reclaim_for_ever(self, group: asyncio.TaskGroup) -> None:
        """Keep our jobs from counting as abandoned, and take those that others abandoned."""
        while True:
            await asyncio.sleep(TOUCH_S)
            with contextlib.suppress(*REDIS_ERRORS):
                if self._jobs:
                    entry_ids = [job.entry_id for job in self._jobs.values()]
                    await self._oplog.touch(self._base_model, self._lease.name, entry_ids)
                room = self._config.max_running + CLAIM_AHEAD - len(self._jobs)
                if room > 0:
                    jobs = await self._oplog.claim_abandoned(
                        self._base_model,
                        self._lease.name,
                        idle_ms=int(self._config.claim_idle_s * 1000),
                        max_jobs=room,
                    )
                    await self._start_again(group, jobs)

    async def _start_again(self, group: asyncio.TaskGroup, jobs: list[SamplingJob]) -> None:
        """Start jobs that have been claimed before, but for those that were too often."""
        if not jobs:
            return
        deliveries = await self._oplog.deliveries(self._base_model, self._lease.name)
        poisonous = [job for job in jobs if deliveries.get(job.entry_id, 0) > MAX_DELIVERIES]
        for job in poisonous:
            message = f"the sampler died {MAX_DELIVERIES} times while it had this request"
            await self._settle(job, Outcome.failure(message, "server"))
        self._start(group, (job for job in jobs if job not in poisonous))

    def _start(self, group: asyncio.TaskGroup, jobs: Iterable[SamplingJob]) -> None:
        for job in jobs:
            if job.request_id not in self._jobs:
                self._jobs[job.request_id] = job
                self._spawn(group, self._admit(job))

    async def _admit(self, job: SamplingJob) -> None:
        """Give the job to the engine, with its adapter; a job it refuses fails."""
        tracing.note_queued(job.trace)
        self._began[job.request_id] = time.time()
        try:
            request = _request(job, Sample.model_validate_json(await self._body_of(job)))
            # One load for all who wait for the same adapter.
            async with self._adapter_locks.setdefault(job.weights, asyncio.Lock()):
                added = await self._on_engine(self._add, request, None)
                if not added:
                    files = await outlasting_outage(lambda: read_files(self._blobs, job.weights))
                    await self._on_engine(self._add, request, files)
        except LuthierError as error:
            await self._settle(job, Outcome.failure(error.message, error.category))
        except Exception:
            log.exception("job %s", job.request_id)
            await self._settle(job, Outcome.failure("an internal error of the sampler", "server"))
        else:
            self._work.set()

    def _add(self, request: SampleRequest, files: dict[str, bytes] | None) -> bool:
        """Whether the engine has the request; False if it lacks the adapter and has no files.

        One call on the engine's thread, so that the adapter cannot be evicted in between.
        """
        if files is not None:
            self._engine.add_adapter(request.adapter, files)
        elif request.adapter and not self._engine.has_adapter(request.adapter):
            return False
        self._engine.add(request)
        return True

    # --- running ----------------------------------------------------------------------------------

    def _cancel(self, request_id: str) -> None:
        """A hint: whoever has this request gives its blocks back. Its outcome is stored already."""
        if self._jobs.pop(request_id, None) is not None:
            self._began.pop(request_id, None)
            self._thread.submit(self._engine.cancel, request_id)
            self._room.set()

    async def _step_for_ever(self, group: asyncio.TaskGroup) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._engine.has_work:
                finished, partials = await self._on_engine(self._step)
                for item in finished:
                    note_finished(item)
                    self._spawn(group, self._finish(item))
                with contextlib.suppress(asyncio.QueueFull):
                    for partial in partials.items():
                        self._partials.put_nowait(partial)

    def _step(self) -> tuple[list[Finished], dict[str, str]]:
        return self._engine.step(), self._engine.partials()

    async def _tell_for_ever(self) -> None:
        """Publish what running samples have so far. Hints: what is lost comes with the outcome."""
        while True:
            messages = [await self._partials.get()]
            while not self._partials.empty():
                messages.append(self._partials.get_nowait())
            pipe = self._oplog.redis.pipeline(transaction=False)
            for request_id, message in messages:
                pipe.execute_command("SPUBLISH", keys.sampling_partials(request_id), message)
            with contextlib.suppress(*REDIS_ERRORS):
                await pipe.execute()

    async def _finish(self, finished: Finished) -> None:
        job = self._jobs.get(finished.request_id)
        if job is None:
            return  # cancelled in its last step
        if finished.response is None:
            outcome = Outcome.failure(finished.error or "sampling failed", finished.category)
        else:
            body = await self._result_body(job, finished.response)
            outcome = Outcome.completed(body, "protobuf", usage=_usage(job, finished))
        await self._settle(job, outcome)

    async def _settle(self, job: SamplingJob, outcome: Outcome) -> None:
        """Store the outcome, waiting while Redis is away, and forget the job."""
        while True:
            try:
                await self._oplog.settle(job, self._base_model, outcome)
                began_s = self._began.pop(job.request_id, time.time())
                tracing.note_since("sample", job.trace, began_s, request_id=job.request_id)
                break
            except REDIS_ERRORS:
                log.warning("redis is away; settling %s again", job.request_id)
                await asyncio.sleep(RETRY_S)
        self._jobs.pop(job.request_id, None)
        self._room.set()

    async def _drain(self) -> None:
        """Finish the jobs under way; what is left stays claimed, for our next incarnation."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._jobs:
                    self._room.clear()
                    await self._room.wait()

    # --- plumbing ---------------------------------------------------------------------------------

    def _spawn(self, group: asyncio.TaskGroup, work: Coroutine[None, None, None]) -> None:
        task = group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _on_engine(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def _body_of(self, job: SamplingJob) -> bytes:
        if job.body.inline is not None:
            return job.body.inline
        return job.body.checked(await outlasting_outage(lambda: self._blobs.get(job.body.key)))

    async def _result_body(self, job: SamplingJob, response: bytes) -> Body:
        if len(response) <= INLINE_LIMIT:
            return Body.of(response)
        key = keys.sample_result(job.tenant, job.sampling_session_id, job.seq)
        await outlasting_outage(lambda: self._blobs.put(key, response))
        return Body.stored(key, response)


def _usage(job: SamplingJob, finished: Finished) -> str:
    counts = (
        finished.num_prompt_tokens,
        finished.num_cached_tokens,
        finished.num_sampled_tokens,
    )
    return " ".join([job.sampling_session_id, *map(str, counts)])


def _request(job: SamplingJob, wanted: Sample) -> SampleRequest:
    """The engine's form of a sampling request."""
    params = wanted.sampling_params
    stop = params.stop
    prompt, targets = tuple(wanted.prompt.to_ints()), None
    if wanted.target_prompt_logprobs is not None:
        targets = PromptTargets.parse(wanted.target_prompt_logprobs, len(prompt))
    listed: list[Any] = [stop] if isinstance(stop, str) else list(stop or ())
    return SampleRequest(
        request_id=job.request_id,
        prompt=prompt,
        num_samples=wanted.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        stop_strings=tuple(item for item in listed if isinstance(item, str)),
        stop_tokens=tuple(item for item in listed if isinstance(item, int)),
        ignore_eos=stop == [],
        prompt_logprobs=wanted.prompt_logprobs,
        topk_prompt_logprobs=wanted.topk_prompt_logprobs,
        prompt_logprobs_last_n=wanted.prompt_logprobs_last_n,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=wanted.prompt_alt_tokens_k,
        topk_sample_logprobs=wanted.topk_sample_logprobs,
        adapter=job.weights,
        cache_scope=job.tenant,
        streams=job.streams,
    )
