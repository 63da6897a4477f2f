"""The sampler's control flow: claim jobs, feed the engine, settle each as its request finishes.

Sampling has no order and is executed at least once: a job stays with its claimer until an outcome
is stored, and the first outcome wins. A sampler that starts again takes up the jobs it had claimed;
jobs of one that stays away are claimed by the others.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterable
from dataclasses import replace

from luthier_core import keys, tracing
from luthier_core.blobs import Blobs, outlasting_outage
from luthier_core.checkpoints import read_files
from luthier_core.config import SamplerConfig
from luthier_core.errors import LuthierError
from luthier_core.failpoints import failpoint
from luthier_core.hints import Hints
from luthier_core.lifecycle import WorkerLease
from luthier_core.oplog import REDIS_ERRORS, Oplog
from luthier_core.ops import INLINE_LIMIT, Body, Outcome, SamplingJob
from luthier_core.types import Sample
from luthier_sampler.engine import Finished
from luthier_sampler.engine_thread import SamplerEngine
from luthier_sampler.jobs import request_of, usage_of
from luthier_sampler.observing import note_finished

log = logging.getLogger(__name__)

BLOCK_MS = 1000
FOLLOW_S = 2.0
"""In-flight weights are looked up this often, so a lost hint costs no more."""
TOUCHES = 3
"""How often a job that is being worked on is touched before it counts as abandoned."""
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
        engine: SamplerEngine,
    ) -> None:
        self._base_model = base_model
        self._config = config
        self._lease = lease
        self._oplog = oplog
        self._blobs = blobs
        self._engine = engine
        self._jobs: dict[str, SamplingJob] = {}
        self._began: dict[str, float] = {}
        """Request -> when it was claimed, in seconds since the epoch."""
        self._tasks: set[asyncio.Task[None]] = set()
        """One per job that is being admitted or settled."""
        self._room = asyncio.Event()
        self._published = asyncio.Event()
        self._hints = Hints(oplog.redis, self._on_hint)
        self._partials: asyncio.Queue[tuple[str, str]] = asyncio.Queue(MAX_UNSENT_PARTIALS)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`, then finish what is running, for DRAIN_S at most."""
        try:
            await self._work_until(stop)
        finally:
            await self._engine.close()
        await self._lease.release()

    async def _work_until(self, stop: asyncio.Event) -> None:
        await self._oplog.open_jobs(self._base_model)
        async with asyncio.TaskGroup() as group:
            lost = group.create_task(self._lease.keep(self._config.lease_renew_s))
            stepping = group.create_task(self._step_for_ever(group))
            claiming = group.create_task(self._claim_for_ever(group))
            reclaiming = group.create_task(self._reclaim_for_ever(group))
            listening = group.create_task(self._hints.listen())
            telling = group.create_task(self._tell_for_ever())
            following = group.create_task(self._follow_for_ever())
            await self._hints.subscribe(keys.sampling_cancelled(self._base_model))
            await self._hints.subscribe(keys.sampling_published(self._base_model))
            await self._lease.set_state("ready")
            stopped = group.create_task(stop.wait())
            await asyncio.wait({lost, stopped}, return_when=asyncio.FIRST_COMPLETED)
            await self._lease.set_state("draining")
            claiming.cancel()
            reclaiming.cancel()
            await self._drain()
            for task in (stepping, stopped, lost, listening, telling, following, *self._tasks):
                task.cancel()

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
                # First to the engine with them: sending the next claim takes the loop a while.
                await asyncio.sleep(0)
            except REDIS_ERRORS:
                log.warning("redis is away; claiming again", exc_info=True)
                await asyncio.sleep(RETRY_S)

    async def _reclaim_for_ever(self, group: asyncio.TaskGroup) -> None:
        """Keep our jobs from counting as abandoned, and take those that others abandoned."""
        while True:
            await asyncio.sleep(self._config.claim_idle_s / TOUCHES)
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
        await failpoint("sm.claim")
        tracing.note_queued(job.trace)
        self._began[job.request_id] = time.time()
        try:
            request = request_of(job, Sample.model_validate_json(await self._body_of(job)))
            if job.inflight_run and (newest := await self._oplog.published(job.inflight_run)):
                request = replace(request, adapter=newest.manifest_key)
            await self._engine.add(request, self._files_of)
            if job.inflight_run:
                # The others may have moved on while this request was on its way.
                await self._follow(job.inflight_run)
        except LuthierError as error:
            await self._settle(job, Outcome.failure(error.message, error.category))
        except Exception:
            log.exception("job %s", job.request_id)
            await self._settle(job, Outcome.failure("an internal error of the sampler", "server"))

    # --- in-flight weights ------------------------------------------------------------------------

    async def _follow_for_ever(self) -> None:
        """Move requests on to newer in-flight weights: when hinted, and now and then."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FOLLOW_S):
                    await self._published.wait()
            self._published.clear()
            runs = {job.inflight_run for job in self._jobs.values()} - {""}
            await self._engine.forget_runs(runs)
            for run_id in runs:
                try:
                    await self._follow(run_id)
                except (*REDIS_ERRORS, LuthierError):
                    log.exception("in-flight weights of %s: going on with those before", run_id)

    async def _follow(self, run_id: str) -> None:
        """All requests here that follow the run's in-flight weights run with the newest."""
        if newest := await self._oplog.published(run_id):
            await self._engine.move(run_id, newest, self._files_of)

    # --- running ----------------------------------------------------------------------------------

    def _on_hint(self, channel: str, text: str) -> None:
        if channel == keys.sampling_cancelled(self._base_model):
            self._cancel(text)
        else:
            self._published.set()

    def _cancel(self, request_id: str) -> None:
        """A hint: whoever has this request gives its blocks back. Its outcome is stored already."""
        if self._jobs.pop(request_id, None) is not None:
            self._began.pop(request_id, None)
            self._engine.cancel(request_id)
            self._room.set()

    async def _step_for_ever(self, group: asyncio.TaskGroup) -> None:
        while True:
            finished, partials = await self._engine.step()
            for item in finished:
                note_finished(item)
                self._spawn(group, self._finish(item))
            with contextlib.suppress(asyncio.QueueFull):
                for partial in partials.items():
                    self._partials.put_nowait(partial)

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
        begun_s = self._began[job.request_id]
        await failpoint("sm.store")
        if finished.response is None:
            outcome = Outcome.failure(finished.error or "sampling failed", finished.category)
        else:
            body = await self._result_body(job, finished.response)
            usage = usage_of(job, finished, begun_s=begun_s, worker=self._lease.name)
            outcome = Outcome.completed(body, "protobuf", usage=usage)
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
        await failpoint("sm.ack")
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

    async def _files_of(self, key: str) -> dict[str, bytes]:
        return await outlasting_outage(lambda: read_files(self._blobs, key))

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
