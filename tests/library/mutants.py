"""Planted bugs of oplog.lua: what a suite must notice before its silence is evidence.

A mutant is named after the Lua function in which one piece of text is replaced by another. The old
text must occur there exactly once, so that a change of the library that moves it is noticed.
"""

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from luthier_core.ops import Gradient, Kind

LIBRARY = files("luthier_core").joinpath("oplog.lua").read_text()

NOT_MY_EPOCH = ("num(h[1]) ~= epoch", "false")
NOT_NEXT = "if seq ~= num(h[3]) + 1 or seq > num(h[2])"

MUTANTS: dict[str, tuple[str, str]] = {
    # --- who may write
    "begin: no epoch check": NOT_MY_EPOCH,
    "commit: no epoch check": NOT_MY_EPOCH,
    "commit: only a newer epoch is fenced": ("num(h[1]) ~= epoch", "num(h[1]) < epoch"),
    "blame: no epoch check": NOT_MY_EPOCH,
    "trim: no epoch check": NOT_MY_EPOCH,
    "ffwd: no epoch check": NOT_MY_EPOCH,
    "publish: no epoch check": NOT_MY_EPOCH,
    "fail_range: no epoch check": NOT_MY_EPOCH,
    "halve: no epoch check": ("num(h[1]) ~= tonumber(args[1])", "false"),
    "release: no epoch check": ("num(h[1]) ~= tonumber(args[1])", "false"),
    **{
        f"{function}: on a server that was restarted": ("check_server(args[2])", "")
        for function in (
            *("acquire", "release", "begin", "commit", "blame", "halve", "trim", "ffwd"),
            *("publish", "fail_range"),
        )
    },
    "acquire: an equal epoch takes the run": ("epoch > num(h[1])", "epoch >= num(h[1])"),
    "acquire: a repeated call is stale": ("epoch == num(h[1]) and h[2] == args[3]", "false"),
    "admit: another tenant's run": ("h[1] ~= tenant", "false"),
    "enqueue: another tenant's session": ("known ~= tenant", "false"),
    # --- once, and in order
    "admit: no dedupe": ("seq <= admitted or is_parked", "false"),
    "admit: no dedupe above a gap": ("redis.call('HEXISTS', parked, seq) == 1", "false"),
    "admit: order of arrival": ("  if seq > admitted + 1 then", "  if false then"),
    "admit: told is not stamped": ("fields[#fields + 1] = h[5]", "fields[#fields + 1] = '-1'"),
    "same: any body": ("known == string.sub(digest, 1, DIGEST_CHARS)", "true"),
    "same: none is a duplicate after trim": ("known == nil or ", ""),
    "advance: only the first parked op": ("unpark(header, parked, admitted)", "break"),
    "advance: drained ops stay parked": ("unpark(header, parked, admitted)", ""),
    "begin: any op": (NOT_NEXT, "if false"),
    "commit: above admitted": (NOT_NEXT, "if seq ~= num(h[3]) + 1"),
    "commit: out of order": (NOT_NEXT, "if seq > num(h[2])"),
    "commit: a second outcome overwrites the first": (
        "return { 'ALREADY' }",
        "redis.call('HSET', keys[2], unpack(rest(args, 8))) return { 'ALREADY' }",
    ),
    "commit: the state's digest is not kept": ("args[7] ~= ''", "false"),
    "commit: begins what is not admitted": (
        "next_seq == seq + 1 and next_seq <= num(h[2])",
        "true",
    ),
    "store_outcome: failures are not remembered": ("== 'failed'", "== ''"),
    "store_outcome: never expires": ("redis.call('PEXPIRE', outcome, ttl)", ""),
    "reject_run: no tombstone": ("redis.call('HSET', outcome, unpack(rest(args, 5)))", ""),
    # --- quotas
    "admit: quota without the executable rule": ("over and admitted > committed and", "over and"),
    "admit: quota holds back what fills a gap": ("and not fills_gap", ""),
    "admit: quota counts no bytes": ("pending + bytes > max_bytes or ", ""),
    "admit: no limit ahead": ("seq > admitted + max_ahead", "false"),
    "admit: no limit of parked bytes": ("parked_bytes + bytes > max_parked_bytes", "false"),
    "admit: a refusal does not fit above a gap": (
        " and field_of(fields, 'kind') ~= 'rejected'",
        "",
    ),
    "unpark: bytes stay parked": ("redis.call('HINCRBY', header, 'parked_bytes', 0 - bytes)", ""),
    "forget_pending: bytes stay": ("redis.call('HINCRBY', header, 'bytes', 0 - bytes)", ""),
    # --- quarantine
    "note_attempt: attempts count as deaths": (
        "num(known[2], 0)",
        "attempts - 1",
    ),
    "note_attempt: every call is an attempt": ("tonumber(last) ~= epoch", "true"),
    "note_attempt: there is but one": ("tonumber(last) ~= epoch", "attempts == 0"),
    "blame: nothing is counted": ("'b:' .. seq, 1)", "'b:' .. seq, 0)"),
    "blame: a death told twice counts twice": ("a[1] == a[2]", "false"),
    "blame: without an attempt": ("not a[1] then return -2", "not a[1] then return 1"),
    "halve: an op that is committed": ("seq <= num(h[3]) or ", ""),
    "halve: an op that is not there": (" or seq > num(h[2])", ""),
    "forget_pending: deaths stay": (", 'b:' .. seq, 'a:' .. seq)", ")"),
    # --- snapshots and the end of a run
    "trim: what is not committed": ("seq > num(h[2])", "false"),
    "trim: one entry too many": ("entry_id(seq + 1)", "entry_id(seq + 2)"),
    "trim: fields stay": (
        "redis.call('HDEL', header, 'd:' .. s, 'x:' .. s, 's:' .. s, 'm:' .. s)",
        "",
    ),
    "ffwd: goes back": ("seq <= committed", "false"),
    "ffwd: parked ops stay": ("tonumber(s) <= seq", "false"),
    "ffwd: bytes stay": ("forget_pending(header, s)", ""),
    "ffwd: what waits above is not admitted": (
        "advance(header, keys[2], parked, keys[4], seq)",
        "redis.call('HSET', header, 'admitted', seq)",
    ),
    "publish: goes back": ("seq <= s", "seq == s"),
    "told: a later failure is enough": ("tonumber(untold[1]) - 1", "tonumber(seq)"),
    "told: one delivery for all": ("if s == seq", "if true"),
    "told: deliveries are not noted": (
        "if s == seq then is_untold = true",
        "if false then is_untold = true",
    ),
    "note_untold: only the last": ("untold and untold .. ' ' .. seq or seq", "seq"),
    "note_untold: a step forgets nothing": ("redis.call('HDEL', header, 'untold')", ""),
    "note_untold: whatever becomes of it": ("gradient == 'lost'", "true"),
    # --- gaps
    "admit: a gap has no time": ("redis.call('HSETNX', header, 'gap_since', now)", ""),
    "admit: all that waits renews its gap": (
        "redis.call('HSETNX', header, 'gap_since', now)",
        "redis.call('HSET', header, 'gap_since', now)",
    ),
    "admit: the next gap is as old as the first": (
        "redis.call('HEXISTS', header, 'gap_since') == 1",
        "false",
    ),
    "remember: no time": (" .. ' ' .. now", " .. ' 0'"),
    "forget_gap: while something waits": ("redis.call('HLEN', parked) == 0", "true"),
    "advance: a filled gap stays": ("forget_gap(header, parked)", ""),
    "fail_range: a failed gap stays": ("forget_gap(header, parked)", ""),
    "release: with work left": ("num(h[2]) > num(h[3])", "false"),
    "fail_range: parked ops stay": ("redis.call('HEXISTS', parked, seq) == 1", "false"),
    "fail_range: what waits above is forgotten": ("tonumber(s) > last", "false"),
    "fail_range: outcomes are overwritten": ("first ~= num(h[3]) + 1", "false"),
    "fail_range: the run stays active": (", 'status', 'failed')", ")"),
    "fail_range: what has arrived fails too": ("or num(h[2]) > num(h[3]) then", "then"),
    "lost: what is here": ("tonumber(args[1]) <= num(admitted)", "false"),
    "lost: what is parked": ("redis.call('HEXISTS', keys[2], args[1]) == 0", "true"),
    "forget_gap: it stays lost": (", 'gap_since', 'lost'", ", 'gap_since'"),
    # --- sampling
    "enqueue: no dedupe": ("if first then", "if false then"),
    "enqueue: the queue has no limit": ("redis.call('XLEN', jobs) >= tonumber(args[5])", "false"),
    "enqueue: seqs are Lua numbers": ("'*', 'seq', seq", "'*', 'seq', tonumber(seq)"),
    "enqueue: the entry is not noted": ("'entry', entry, ", ""),
    "enqueue: a refusal is not listed": (
        "complete(header, keys[4], args[4], seq, 'failed', field_of(fields, 'size'), args[6])",
        "",
    ),
    "complete: one count for all clones": ("'completed:' .. clone", "'completed:'"),
    "complete: never expires": ("redis.call('PEXPIRE', completions, ttl)", ""),
    "store_sample: the last outcome wins": ("state ~= 'queued'", "false"),
    "store_sample: for an expired record": ("state ~= 'queued'", "state and state ~= 'queued'"),
    "store_sample: not listed": (
        "complete(header, completions, clone, seq, done, field_of(fields, 'size'), ttl)",
        "",
    ),
    "store_sample: a failure is listed as finished": ("or 'failed'", "or 'finished'"),
    "settle: the job stays": ("redis.call('XDEL', keys[3], args[4])", ""),
    "settle: the claim stays": ("redis.call('XACK', keys[3], args[3], args[4])", ""),
    "cancel: the job stays": ("redis.call('XDEL', keys[3], entry)", ""),
    "cancel: the claim stays": ("redis.call('XACK', keys[3], args[3], entry)", ""),
    "cancel: a sample that has ended": (
        "store_sample(keys, args[1], args[2], args[4], rest(args, 6))",
        "redis.call('HSET', keys[2], unpack(rest(args, 6)))",
    ),
}


def mutated(name: str) -> str:
    """The library with one planted bug."""
    function = name.partition(":")[0]
    found = re.search(rf"^local function {function}\(.*?^end$", LIBRARY, re.MULTILINE | re.DOTALL)
    assert found, f"{name}: no such function"
    old, new = MUTANTS[name]
    assert found[0].count(old) == 1, f"{name}: occurs {found[0].count(old)} times, not once"
    return LIBRARY.replace(found[0], found[0].replace(old, new))


Program = list[tuple[str, Mapping[str, Any]]]
"""Steps of a LibraryMachine: the rule and its arguments."""

IDLE_RUN = ("start", {"limits": "wide", "num_ops": 1, "num_done": 1})
ENQUEUED = (
    "enqueue",
    {"nth": 0, "data": b"a", "tenant": "ann", "refused": False, "max_jobs": 9},
)
CLAIMED = ("claim", {"max_jobs": 1, "consumer": "sampler-0"})
CANCELLED = ("cancel", {"nth": 0})
TWO_FAILED: Program = [
    ("start", {"limits": "wide", "num_ops": 3, "num_done": 1}),
    ("work", {"num_ops": 2, "outcome": "failed"}),
]
"""Seqs 1 and 2."""
SETTLED = ("settle", {"pick": 0, "outcome": "done"})
NOTHING_LATE = {"epoch_error": 0, "gap": 0}


def post_above(
    gap: int, data: bytes = b"", kind: Kind = Kind.FORWARD
) -> tuple[str, dict[str, Any]]:
    return "post_above_a_gap", {"some_gaps": [gap], "data": data, "kind": kind}


PROGRAMS: dict[str, Program] = {
    "acquire: a repeated call is stale": [
        IDLE_RUN,
        ("acquire", {"ahead": 0, "owner": "trainer-0/a"}),
    ],
    "commit: a second outcome overwrites the first": [
        IDLE_RUN,
        (
            "commit",
            {
                **{"epoch_error": 0, "seq_error": -1, "outcome": "stored"},
                **{"gradient": Gradient.KEPT, "begin_next": False},
            },
        ),
    ],
    "admit: quota holds back what fills a gap": [
        ("start", {"limits": "few ops", "num_ops": 1, "num_done": 1}),
        post_above(4),
        ("post", {"num_ops": 4, "data": b"", "kind": Kind.FORWARD}),
    ],
    "admit: a refusal does not fit above a gap": [
        ("start", {"limits": "few bytes", "num_ops": 1, "num_done": 1}),
        post_above(1, b"c" * 12),
        post_above(2, b"a", Kind.REJECTED),
    ],
    "ffwd: parked ops stay": [
        IDLE_RUN,
        post_above(1),
        ("ffwd", {"ahead": 3, **NOTHING_LATE}),
    ],
    "ffwd: what waits above is not admitted": [
        IDLE_RUN,
        post_above(1),
        ("ffwd", {"ahead": 1, **NOTHING_LATE}),
    ],
    "fail_range: parked ops stay": [
        IDLE_RUN,
        post_above(1, b"a"),
        ("fail_what_waits", {"seq_error": 0, "num_more": 0, **NOTHING_LATE}),
    ],
    "fail_range: what waits above is forgotten": [
        IDLE_RUN,
        ("fail_what_waits", {"epoch_error": 0, "seq_error": 0, "num_more": 0, "gap": 3}),
    ],
    "note_untold: a step forgets nothing": [
        ("start", {"limits": "wide", "num_ops": 4, "num_done": 1}),
        TWO_FAILED[1],
        (
            "commit",
            {
                **{"epoch_error": 0, "seq_error": 0, "outcome": "done"},
                **{"gradient": Gradient.CLEARED, "begin_next": False},
            },
        ),
    ],
    "told: a later failure is enough": [*TWO_FAILED, ("deliver_a_failure", {"pick": 0})],
    "told: one delivery for all": [*TWO_FAILED, ("deliver_a_failure", {"pick": 1})],
    "admit: the next gap is as old as the first": [
        IDLE_RUN,
        post_above(1),
        post_above(3),
        ("post", {"num_ops": 1, "data": b"", "kind": Kind.FORWARD}),
    ],
    "fail_range: a failed gap stays": [
        IDLE_RUN,
        post_above(1),
        ("fail_what_waits", {"seq_error": 0, "num_more": 0, **NOTHING_LATE}),
    ],
    "cancel: the claim stays": [ENQUEUED, CLAIMED, CANCELLED],
    "cancel: a sample that has ended": [ENQUEUED, CLAIMED, SETTLED, CANCELLED],
    "same: none is a duplicate after trim": [
        IDLE_RUN,
        ("trim", {"epoch_error": 0, "back": 0}),
        ("post_again", {"pick": 0, "data": None, "tenant": "ann"}),
    ],
    "admit: told is not stamped": [
        *TWO_FAILED,
        ("deliver_a_failure", {"pick": 1}),
        ("post", {"num_ops": 1, "data": b"", "kind": Kind.FORWARD}),
    ],
    "admit: no limit of parked bytes": [
        ("start", {"limits": "few bytes", "num_ops": 1, "num_done": 1}),
        post_above(1, b"c" * 12),
        post_above(2, b"a"),
    ],
    "admit: quota counts no bytes": [
        ("start", {"limits": "few bytes", "num_ops": 1, "num_done": 1}),
        ("post", {"num_ops": 2, "data": b"c" * 12, "kind": Kind.FORWARD}),
    ],
    "enqueue: another tenant's session": [
        ENQUEUED,
        ("enqueue", {**ENQUEUED[1], "tenant": "eve"}),
    ],
    "enqueue: a refusal is not listed": [("enqueue", {**ENQUEUED[1], "refused": True})],
    "enqueue: the queue has no limit": [
        ENQUEUED,
        ("enqueue", {**ENQUEUED[1], "nth": 1, "max_jobs": 1}),
    ],
    "store_sample: the last outcome wins": [
        ENQUEUED,
        CLAIMED,
        SETTLED,
        ("settle", {"pick": 0, "outcome": "stored"}),
    ],
    "store_sample: for an expired record": [
        ENQUEUED,
        CLAIMED,
        ("expire", {"pick": 0, "sampled": True}),
        SETTLED,
    ],
}
"""For mutants that random programs find late: what they must find first."""
