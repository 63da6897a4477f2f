"""The real side of the model-based test: the function library on a throw-away Valkey.

`contents` of the server and `expected_contents` of a model have one form, so that they can be
compared whole: nothing that a function writes goes unseen.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import redis.asyncio as redis
from tests.library.model import JobQueue, Model, Run

from luthier_core import keys
from luthier_core.oplog import Completion, Oplog
from luthier_core.ops import Op
from luthier_core.testing import running_valkey

# Every key with its value, in one round trip. A parked entry is shown as fields, like a log entry.
READ_ALL = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, value, claims = redis.call('TYPE', key).ok, {}, {}
  if kind == 'hash' then
    value = redis.call('HGETALL', key)
    if string.sub(key, -5) == ':park' then
      for i = 2, #value, 2 do value[i] = cmsgpack.unpack(value[i]) end
    end
  elseif kind == 'stream' then
    value = redis.call('XRANGE', key, '-', '+')
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', key)) do
      claims = redis.call('XPENDING', key, group[2], '-', '+', 1000)
    end
  end
  found[#found + 1] = { key, kind, redis.call('PTTL', key) > 0 and 1 or 0, value, claims }
end
return found
"""


class Hash(NamedTuple):
    """A Redis hash; only where an expiry belongs is part of the promise, not when."""

    expires: bool
    fields: dict[str, Any]


class Listed(NamedTuple):
    """The completions of one clone: entry id and fields of each."""

    expires: bool
    entries: list[tuple[str, dict[str, str]]]


Contents = dict[str, object]
"""key -> Hash, Listed, or the entries of a stream"""


REDIS_CLOCK = "redis.call('TIME')"


class Server:
    """An Oplog on its own event loop, for callers that are not coroutines."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = redis.Redis.from_url(url, single_connection_client=True)
        self._read_all = self._client.register_script(READ_ALL)
        self.now_s = 0.0
        self.oplog = Oplog(self._client, clock=lambda: self.now_s)

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(call)

    def load(self, library: str) -> None:
        """With its own clock stopped at 0: positions are counted, the model need not know it."""
        assert REDIS_CLOCK in library
        library = library.replace(REDIS_CLOCK, "{ 0, 0 }")
        self.run(cast(Any, self._client.function_load(library, replace=True)))

    def clear(self) -> None:
        self.run(cast(Any, self._client.flushall()))

    def delete(self, key: str) -> None:
        """What the expiry of a key does."""
        self.run(cast(Any, self._client.delete(key)))

    def contents(self) -> Contents:
        rows = self.run(self._read_all())
        found = {key.decode(): _value(key, *rest) for key, *rest in rows}
        jobs = {entry_id.decode(): _pairs(job)["seq"] for entry_id, job in _all_jobs(rows)}
        for value in found.values():
            if isinstance(value, Hash) and "entry" in value.fields:
                value.fields["entry"] = jobs.get(value.fields["entry"], GONE)
        return {key: value for key, value in found.items() if value not in NOTHING}

    def save(self) -> list[tuple[bytes, int, bytes]]:
        """(key, TTL in ms, DUMP) of every key: what `restore` takes."""
        return cast(list[tuple[bytes, int, bytes]], self.run(self._save()))

    def restore(self, saved: list[tuple[bytes, int, bytes]]) -> None:
        """Roll the server back."""
        self.run(self._restore(saved))

    def close(self) -> None:
        self.run(self._client.aclose())
        self._loop.close()

    async def _save(self) -> list[tuple[bytes, int, bytes]]:
        names = cast(list[bytes], await self._client.keys("*"))
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.pttl(name)
            pipe.dump(name)
        replies = await pipe.execute()
        return list(zip(names, replies[::2], replies[1::2], strict=True))

    async def _restore(self, saved: list[tuple[bytes, int, bytes]]) -> None:
        pipe = self._client.pipeline(transaction=True)
        pipe.flushall()
        for name, ttl_ms, value in saved:
            pipe.restore(name, max(0, ttl_ms), value)
        await pipe.execute()


@contextmanager
def running_server() -> Iterator[Server]:
    """An empty server without a library."""
    with running_valkey() as url:
        server = Server(url)
        try:
            yield server
        finally:
            server.close()


def expected_contents(model: Model) -> Contents:
    """What a server holds after the calls that the model has answered."""
    found: Contents = {}
    for run_id, run in model.runs.items():
        found[keys.run_header(run_id)] = Hash(run.expires, _header_fields(run))
        found[keys.run_log(run_id)] = [
            (f"{seq}-0" if seq else "0-1", _op_fields(run.log[seq])) for seq in sorted(run.log)
        ]
        parked = {str(seq): _op_fields(op) for seq, op in run.parked.items()}
        found[keys.run_parked(run_id)] = Hash(False, parked)
    for (run_id, seq), outcome in model.outcomes.items():
        found[keys.run_outcome(run_id, seq)] = Hash(True, _text(outcome.fields()))
    for session, header in model.samplers.items():
        counted = {
            f"completed:{clone}": str(number)
            for (name, clone), number in model.num_completed.items()
            if name == session
        }
        found[keys.sampling_header(session)] = Hash(False, {**header, **counted})
    for (session, clone), entries in model.completed.items():
        listed = [(f"{at}-0", _completion_fields(entry)) for at, entry in sorted(entries.items())]
        found[keys.sampling_completions(session, clone)] = Listed(True, listed)
    jobs = {str(n): job for queue in model.queues.values() for n, job in queue.jobs.items()}
    for (session, seq_text), sample in model.samples.items():
        fields = _text(sample)
        if entry := fields.get("entry"):
            fields["entry"] = jobs[entry][b"seq"].decode() if entry in jobs else GONE
        found[keys.sampling_outcome(session, seq_text)] = Hash(True, fields)
    for base_model, queue in model.queues.items():
        found[keys.sampling_jobs(base_model)] = _waiting_jobs(queue)
    return {key: value for key, value in found.items() if value not in NOTHING}


GONE = "gone"
"""In place of the entry id of a job that has left its stream; of one that waits, its seq is shown:
ids are the server's clock."""

NOTHING: tuple[object, ...] = ([], Hash(False, {}), Listed(True, []))
"""An emptied stream stays as a key, an emptied hash does not; neither holds anything."""


def _header_fields(run: Run) -> dict[str, str]:
    fields: dict[str, object] = {
        **run.fields,
        **{name: getattr(run, name) for name in ("tenant", "status", "epoch", "owner")},
        **{name: getattr(run, name) for name in ("admitted", "committed", "told")},
        "bytes": run.pending_bytes,
        "parked_bytes": run.parked_bytes,
        **{
            f"d:{seq}": f"{known[0]} {known[1]} {known[2]}" for seq, known in run.admissions.items()
        },
        **{f"x:{seq}": 1 for seq in run.failed},
        **{f"s:{seq}": digest for seq, digest in run.digests.items()},
        **{f"m:{seq}": halvings for seq, halvings in run.halvings.items()},
        **{f"n:{seq}": _words(attempt) for seq, attempt in run.attempts.items()},
        **{f"b:{seq}": deaths for seq, deaths in run.deaths.items()},
        **{f"a:{seq}": _words(attempt) for seq, attempt in run.blamed.items()},
    }
    if run.untold:
        fields["untold"] = " ".join(str(seq) for seq in sorted(run.untold))
    if run.gap_since:
        fields["gap_since"] = run.gap_since
    if run.lost >= 0:
        fields["lost"] = run.lost
    if run.trimmed >= 0:
        fields["trimmed"] = run.trimmed
    if run.published[2]:
        names = ("published_epoch", "published_seq", "published")
        fields.update(zip(names, run.published, strict=True))
    return {name: str(value) for name, value in fields.items()}


def _words(numbers: tuple[int, ...]) -> str:
    return " ".join(str(number) for number in numbers)


def _completion_fields(entry: Completion) -> dict[str, str]:
    seq = entry.request_id.rpartition(":")[2]
    return {"seq": seq, "state": entry.state, "size": str(entry.num_bytes)}


def _op_fields(op: Op) -> dict[str, str]:
    return _text({**op.fields(), "at": str(op.admitted_ms), "told": str(op.told)})


def _waiting_jobs(queue: JobQueue) -> list[tuple[str, dict[str, str]]]:
    """(who claimed it, fields) of each job; ids are left out, they are the server's clock."""
    return [
        (queue.claims.get(entry_id, ""), {k.decode(): v.decode() for k, v in fields.items()})
        for entry_id, fields in queue.jobs.items()
    ]


def _text(fields: Mapping[str, str | bytes]) -> dict[str, str]:
    return {name: v.decode() if isinstance(v, bytes) else v for name, v in fields.items()}


def _value(key: bytes, kind: bytes, expires: int, value: list[Any], claims: list[Any]) -> object:
    """One key's value as READ_ALL gives it, in the form of expected_contents."""
    if kind == b"hash":
        return Hash(bool(expires), _pairs(value))
    if b":q:" not in key:
        entries = [(entry_id.decode(), _pairs(fields)) for entry_id, fields in value]
        return Listed(bool(expires), entries) if b":completed:" in key else entries
    holders = {entry_id: consumer.decode() for entry_id, consumer, *_ in claims}
    jobs = [(holders.pop(entry_id, ""), _pairs(fields)) for entry_id, fields in value]
    return jobs + [(holder, {}) for holder in holders.values()]  # claims of what is not there


def _all_jobs(rows: list[Any]) -> Iterator[tuple[bytes, list[Any]]]:
    for key, _, _, value, _ in rows:
        if b":q:" in key:
            yield from value


def _pairs(flat: list[Any]) -> dict[str, Any]:
    """Redis answers a hash, and a list of fields, as name, value, name, value."""
    return {
        name.decode(): value.decode() if isinstance(value, bytes) else _pairs(value)
        for name, value in zip(flat[::2], flat[1::2], strict=True)
    }
