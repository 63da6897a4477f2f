"""Whether a faulted play of a script is what the undisturbed one was, bit for bit."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tests.chaos.script import Transcript
from tests.chaos.stack import Stack
from tests.cluster.oracle import Verdict, check_history
from tests.cluster.processes import API_KEY, TENANT
from tests.contract.gateway_client import PROTOBUF

from luthier_core import keys
from luthier_core.blobs import Blobs, outlasting_outage
from luthier_core.checkpoints import read_manifest
from luthier_core.oplog import RunHeader
from luthier_core.protocol import Head

Checkpoints = dict[str, Any]
"""seq of a save -> its kind and the sha256 of each file; weights, moments and step among them."""


@dataclass(slots=True)
class Played:
    """What one play has left behind."""

    told: Transcript
    checkpoints: list[Checkpoints] = field(default_factory=list)
    """One per run."""
    answers: dict[str, str] = field(default_factory=dict)
    """request id -> sha256 of what a poll for it was answered."""


async def gather(stack: Stack, told: Transcript) -> Played:
    """What a play that has ended left in the store, and how its requests are answered now."""
    played = Played(told)
    for run_id in told.run_ids:
        played.checkpoints.append(await _checkpoints(stack.blobs, run_id))
    async with aiohttp.ClientSession() as http:
        for run_id in told.run_ids:
            header = await stack.oplog.header(run_id)
            for seq in range(header.committed + 1 if header else 0):
                request_id = f"{run_id}:{seq}"
                played.answers[request_id] = await _answer(http, stack.url, request_id)
    return played


async def _checkpoints(blobs: Blobs, run_id: str) -> Checkpoints:
    prefix = keys.checkpoint_manifest(TENANT, run_id, 0).removesuffix("0")
    found = {}
    async for info in blobs.list(prefix):
        manifest = await read_manifest(blobs, info.key)
        files = {name: file.sha256 for name, file in sorted(manifest.files.items())}
        found[info.key.removeprefix(prefix)] = (manifest.kind, files)
    return found


async def _answer(http: aiohttp.ClientSession, url: str, request_id: str) -> str:
    headers = {"X-API-Key": API_KEY, "Accept": PROTOBUF}
    body = {"request_id": request_id}
    async with http.post(f"{url}/api/v1/retrieve_future", json=body, headers=headers) as answer:
        if answer.status >= 500 or answer.status in (408, 429):
            raise aiohttp.ClientError(f"{request_id}: {answer.status}")
        return f"{answer.status} {hashlib.sha256(await answer.read()).hexdigest()}"


def compare(played: Played, reference: Played, *, lossy: bool) -> list[str]:
    """Every difference. `lossy`: what was accepted may have been lost, if the user was told so."""
    told, expected = played.told, reference.told
    name = told.run_ids[0] if told.run_ids else "a run that was never created"
    found = []
    if told.ended_early.startswith("Stuck"):
        found.append(f"{name} is stuck: {told.ended_early}")
    elif told.ended_early and not lossy:
        found.append(f"{name} ended with {told.ended_early}")
    for index, (have, want) in enumerate(zip(told.results, expected.results, strict=False)):
        if have != want and not (lossy and _is_definite(have[1])):
            found.append(f"{name}, result {index}: {_short(have)} instead of {_short(want)}")
            break  # what follows differs too
        if have != want:
            break  # lossy: from here on the program was told that something is lost
    else:
        if not told.ended_early and len(told.results) != len(expected.results):
            found.append(f"{name} has {len(told.results)} results of {len(expected.results)}")
        if not told.ended_early and played.checkpoints != reference.checkpoints:
            found.append(f"{name}: its checkpoints have other bytes")
    return found


def _is_definite(result: Any) -> bool:
    return isinstance(result, tuple) and result[0] == "failed"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 300 else f"{text[:150]} ... {text[-140:]}"


async def judge_history(
    stack: Stack, verdict: Verdict, run_id: str, header: RunHeader | None
) -> None:
    """The counters of one run, from what Redis did, and its fence."""
    if header is None:
        verdict.expect(False, f"{run_id} has no header")
        return
    own = Verdict()
    check_history(own, run_id, range(header.admitted + 1), stack.history.runs[run_id])
    own.counters.accepted = header.admitted + 1
    verdict.counters.add(own.counters)
    verdict.violations += own.violations
    key = keys.run_head(TENANT, run_id)
    head = Head.from_bytes(await outlasting_outage(lambda: stack.blobs.get(key)))
    verdict.expect(head.epoch >= header.epoch, f"{run_id}: HEAD is behind its header")
