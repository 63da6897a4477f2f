"""The client's side of a trainer's runs: what the gateway does with the log."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from luthier_core import keys
from luthier_core.config import LimitsConfig
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.futures import FutureId, Futures
from luthier_core.oplog import Oplog, RunHeader
from luthier_core.ops import Body, Kind, Op, Outcome, Refusal, digest_of
from luthier_core.records import LoraConfig, RunRecord

TENANT, MODEL = "ann", "tiny"
LEARNING_RATE = 0.01
FB, STEP = Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP


@dataclass
class Client:
    """What the gateway does with the log, for runs that count their own requests."""

    oplog: Oplog
    futures: Futures
    blobs: DiskBlobs
    next_seq: dict[str, int] = field(default_factory=dict)
    tenants: dict[str, str] = field(default_factory=dict)
    """Run -> whose it is, if not TENANT's."""

    async def create(self, run_id: str, *, seed: int = 1, source: Any = None) -> None:
        record = RunRecord(
            run_id=run_id,
            tenant=self.tenants.get(run_id, TENANT),
            session_id=run_id.partition(":")[0],
            base_model=MODEL,
            lora=LoraConfig(rank=2, seed=seed),
            optimizer_config={"type": "adamw"},
            created_at=datetime.now(UTC),
        )
        await self.blobs.put(keys.run_record(TENANT, run_id), record.to_bytes())
        body = json.dumps({"run": record.model_dump(mode="json"), "source": source}).encode()
        await self.send(run_id, Kind.CREATE_MODEL, Body.of(body))

    async def send(self, run_id: str, kind: Kind, body: Body) -> int:
        """The seq of an op that is admitted, after those before it."""
        seq = self.next_seq.get(run_id, 0)
        self.next_seq[run_id] = seq + 1
        digest = digest_of(f"{kind} {seq}".encode())
        op = Op(run_id=run_id, seq=seq, kind=kind, digest=digest, body=body)
        header = {"base_model": MODEL, "facts": "{}"}
        admission = await self.oplog.admit(
            op,
            tenant=self.tenants.get(run_id, TENANT),
            limits=LimitsConfig(),
            header=None if seq else header,
        )
        assert admission.status == "OK"
        if not admission.owner:
            await self.oplog.announce_run(MODEL, run_id, seq)
        return seq

    async def forward_backward(self, run_id: str, request: bytes) -> int:
        return await self.send(run_id, FB, Body.of(request))

    async def step(self, run_id: str) -> int:
        params = {"learning_rate": LEARNING_RATE}
        wanted = {"model_id": run_id, "seq_id": self.next_seq[run_id], "adam_params": params}
        return await self.send(run_id, STEP, Body.of(json.dumps(wanted).encode()))

    async def refused(self, run_id: str) -> int:
        return await self.send(run_id, Kind.REJECTED, Refusal(FB, "not like this").body())

    async def save(self, run_id: str, name: str, **fields: Any) -> int:
        seq = self.next_seq[run_id]
        wanted = {"model_id": run_id, "seq_id": seq, "path": name, **fields}
        return await self.send(run_id, Kind.SAVE_WEIGHTS, Body.of(json.dumps(wanted).encode()))

    async def outcome(self, run_id: str, seq: int) -> Outcome:
        future = FutureId.parse(f"{run_id}:{seq}")
        assert future is not None
        outcome = await self.futures.wait(future, timeout_s=30)
        assert outcome is not None, f"seq {seq} has no outcome"
        return outcome

    async def completed(self, run_id: str, seq: int | None = None) -> bytes:
        """The result of an op that succeeds; of the last one unless `seq` is given."""
        outcome = await self.outcome(run_id, self.next_seq[run_id] - 1 if seq is None else seq)
        assert not outcome.failed, outcome
        return outcome.body.inline or b""

    async def failed(self, run_id: str, seq: int) -> tuple[str, str]:
        """(category, message) of an op that fails."""
        outcome = await self.outcome(run_id, seq)
        assert outcome.failed, outcome
        return outcome.category, (outcome.body.inline or b"").decode()

    async def header(self, run_id: str) -> RunHeader:
        header = await self.oplog.header(run_id)
        assert header is not None
        return header
