"""Organisations, projects, users and keys through the registry's client; the audit log."""

import contextlib
import json
import random
import string
from collections import Counter
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from tests.unit.registry_stack import Stack

from luthier_core import keys
from luthier_core.auth import KEY_PREFIX, is_damaged, key_hmac, new_api_key
from luthier_core.caller import CALLER, Caller
from luthier_core.config import Config
from luthier_core.errors import BadRequest, InvalidField, NotFound, Unauthorized
from luthier_core.lifecycle import WorkerLease
from luthier_core.oplog import Oplog
from luthier_gateway.auth import Authenticator
from luthier_registry import app as registry_app
from luthier_registry.audit import Audit
from luthier_registry.audited import EVENTS


async def _org(stack: Stack, org: str = "acme", **fields: Any) -> None:
    await stack.client.admin("POST", "/orgs", body={"org_id": org, **fields})


async def _key(stack: Stack, org: str = "acme", **fields: Any) -> dict[str, Any]:
    return await stack.client.admin("POST", f"/orgs/{org}/keys", body=fields)


def _name(stack: Stack, key: str) -> str:
    return key_hmac(stack.config.secret(), key)


# --- keys -----------------------------------------------------------------------------------------


async def test_a_new_key_is_shown_once_and_stored_nowhere(stack: Stack) -> None:
    await _org(stack)
    made = await _key(stack, name="laptop", scopes=["read", "train"])
    assert made["key"].startswith("tml-")
    assert len(made["key"]) > 43
    (shown,) = (await stack.client.admin("GET", "/orgs/acme/keys"))["keys"]
    assert shown["key_id"] == made["key_id"]
    assert "key" not in shown
    found = (await stack.client.get_key(_name(stack, made["key"]))).key
    assert (found.tenant, found.scopes, found.name) == ("acme", ("read", "train"), "laptop")
    secret_part = made["key"].removeprefix(KEY_PREFIX).encode()
    async for info in stack.blobs.list(""):
        assert secret_part not in await stack.blobs.get(info.key), info.key
    async for name in stack.valkey.scan_iter():
        assert secret_part not in await stack.valkey.dump(name)


async def test_a_key_ends_when_it_is_revoked_expires_or_its_organisation_is_disabled(
    stack: Stack,
) -> None:
    await _org(stack)
    revoked, expired, other = [
        await _key(stack, **fields) for fields in ({}, {"expires_in_days": 1}, {})
    ]
    await stack.client.admin("DELETE", f"/orgs/acme/keys/{revoked['key_id']}")
    with pytest.raises(NotFound):
        await stack.client.get_key(_name(stack, revoked["key"]))
    await stack.client.get_key(_name(stack, expired["key"]))
    stack.clock.now += timedelta(days=1)
    with pytest.raises(NotFound):
        await stack.client.get_key(_name(stack, expired["key"]))
    await stack.client.get_key(_name(stack, other["key"]))
    await stack.client.admin("PATCH", "/orgs/acme", body={"disabled": True})
    with pytest.raises(NotFound):
        await stack.client.get_key(_name(stack, other["key"]))


async def test_a_user_who_leaves_takes_all_keys_along(stack: Stack) -> None:
    await _org(stack)
    await stack.client.admin(
        "POST", "/orgs/acme/users", body={"user_id": "kim", "email": "kim@acme.example"}
    )
    theirs, another = await _key(stack, user_id="kim"), await _key(stack)
    assert (await stack.client.get_key(_name(stack, theirs["key"]))).email == "kim@acme.example"
    answer = await stack.client.admin("DELETE", "/orgs/acme/users/kim")
    assert answer == {"num_revoked_keys": 1}
    with pytest.raises(NotFound):
        await stack.client.get_key(_name(stack, theirs["key"]))
    await stack.client.get_key(_name(stack, another["key"]))


async def test_a_key_of_another_organisation_is_not_there(stack: Stack) -> None:
    await _org(stack)
    await _org(stack, "other")
    made = await _key(stack)
    with pytest.raises(NotFound):
        await stack.client.admin("DELETE", f"/orgs/other/keys/{made['key_id']}")
    assert (await stack.client.admin("GET", "/orgs/other/keys"))["keys"] == []
    await stack.client.get_key(_name(stack, made["key"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"scopes": ["everything"]},
        {"scopes": []},
        {"expires_in_days": 0},
        {"project_id": "../x"},
        {"limits": {"requests_per_s": 0}},
    ],
)
async def test_a_wrong_key_request_names_the_field(stack: Stack, fields: dict[str, Any]) -> None:
    await _org(stack)
    with pytest.raises(InvalidField, match=next(iter(fields))):
        await _key(stack, **fields)


async def test_a_limit_that_there_is_none_of_is_refused_with_those_there_are(stack: Stack) -> None:
    await _org(stack)
    with pytest.raises(InvalidField, match=r"limits: .*request_per_s.*requests_per_s, queued_by"):
        await _key(stack, limits={"request_per_s": 1})


async def test_a_key_needs_an_organisation_a_project_and_a_user_that_exist(stack: Stack) -> None:
    with pytest.raises(NotFound):
        await _key(stack)
    await _org(stack)
    for fields in ({"project_id": "none"}, {"user_id": "none"}):
        with pytest.raises(NotFound):
            await _key(stack, **fields)


@pytest.mark.parametrize(
    "what", ["usage?starting_on=2026-01-04T00&ending_before=2026-01-05T00", "audit/check"]
)
async def test_an_organisation_that_is_not_there_has_no_usage_and_no_audit_log(
    stack: Stack, what: str
) -> None:
    with pytest.raises(NotFound, match="org_id='acme'"):
        await stack.client.admin("GET", f"/orgs/acme/{what}")
    await _org(stack)
    await stack.client.admin("GET", f"/orgs/acme/{what}")


async def test_making_the_same_twice_is_one_and_another_under_its_name_is_refused(
    stack: Stack,
) -> None:
    await _org(stack, name="Acme")
    await _org(stack, name="Acme")
    with pytest.raises(BadRequest, match="org_id='acme' exists already"):
        await _org(stack, name="Another")
    assert [org["org_id"] for org in (await stack.client.admin("GET", "/orgs"))["orgs"]] == ["acme"]


async def test_what_a_project_key_makes_belongs_to_the_project(stack: Stack) -> None:
    token = CALLER.set(Caller("ann", "0123456789ab", frozenset({"train"}), project_id="blue"))
    try:
        session = await stack.client.create_session("ann")
        assert (session.project_id, session.key_id) == ("blue", "0123456789ab")
        with pytest.raises(InvalidField, match="project_id"):
            await stack.client.create_session("ann", project_id="red")
        with pytest.raises(InvalidField, match="project_id"):
            await stack.client.set_project("ann", session.session_id, "red")
    finally:
        CALLER.reset(token)


# --- keys that are none -------------------------------------------------------------------------


def _mutations(key: str, rng: random.Random) -> str:
    """The key with one thing wrong."""
    letters = string.ascii_letters + string.digits + "-_"
    at = rng.randrange(len(key))
    kind = rng.randrange(7)
    if kind == 0:
        return key[:at]
    if kind == 1:
        return key[:at] + rng.choice(letters) + key[at:]
    if kind == 2:
        return key[:at] + key[at + 1 :]
    if kind == 3:
        return key[:at] + rng.choice(letters) + key[at + 1 :]
    if kind == 4:
        return key.swapcase()[: at + 1] + key[at + 1 :]
    if kind == 5:
        return new_api_key()  # well-formed, and nobody's
    return "eyJhbGciOiJub25lIn0." + key[:at] + "."  # a token of another kind, without signature


async def test_no_mutated_key_is_accepted(stack: Stack) -> None:
    """10,000 keys with one thing wrong, in seven classes (reliability S1)."""
    await _org(stack)
    key = (await _key(stack))["key"]
    auth = Authenticator(stack.client, stack.config.secret(), cache_s=60)
    assert (await auth.caller(key)).tenant == "acme"
    rng = random.Random(7)
    tried = [m for m in (_mutations(key, rng) for _ in range(10_100)) if m != key][:10_000]
    accepted = []
    for mutated in tried:
        with contextlib.suppress(Unauthorized):
            accepted.append(await auth.caller(mutated))
    assert len(tried) == 10_000
    assert not accepted
    print(f"S1: {len(tried)} mutated keys in 7 classes, 0 accepted")


def test_the_checksum_of_a_key_finds_every_single_wrong_character() -> None:
    key = new_api_key()
    assert not is_damaged(key)
    assert not is_damaged("tml-chosen-by-the-operator")
    for at in range(len(KEY_PREFIX), len(key)):
        assert is_damaged(key[:at] + ("a" if key[at] != "a" else "b") + key[at + 1 :])


# --- audit log ------------------------------------------------------------------------------------


def test_every_audited_call_is_one_that_there_is(config: Config) -> None:
    app = registry_app.build_app(config)
    handlers = {
        getattr(route.handler, "__name__", "") for route in app.router.routes() if route.resource
    }
    assert EVENTS.keys() <= handlers


async def test_each_audited_call_leaves_exactly_one_entry(stack: Stack) -> None:
    """Every event there is, once; and who did it, in the log of the organisation it is about."""
    run, client = await stack.run(), stack.client
    await stack.save(run)
    await stack.save(run, name="y")
    path, other = (run.run_id, "weights", "x"), (run.run_id, "weights", "y")
    oplog = Oplog(stack.valkey)
    await oplog.load_library()
    for name in ("t0", "t1"):
        await WorkerLease(oplog, name, role="trainer", base_model="tiny", lease_s=600).take()
    await stack.valkey.hset(keys.run_header(run.run_id), mapping=_HEADER)
    org, admin = "/orgs/ann", partial(client.admin, tenant="ann")
    kim = {"user_id": "kim", "email": "kim@ann.example"}
    token = CALLER.set(Caller("ann", "0123456789ab", frozenset()))
    try:
        await admin("POST", "/orgs", body={"org_id": "ann"})
        await admin("PATCH", org, body={"name": "Ann"})
        await admin("POST", f"{org}/projects", body={"project_id": "blue"})
        await admin("POST", f"{org}/users", body=kim)
        made = [await admin("POST", f"{org}/keys", body={}) for _ in range(2)]
        await admin("DELETE", f"{org}/keys/{made[0]['key_id']}")
        await client.revoke_key(_name(stack, made[1]["key"]))
        await admin("DELETE", f"{org}/users/kim")
        await client.publish("ann", *path)
        await client.unpublish("ann", *path)
        await client.set_ttl("ann", *path, 60)
        await client.checkpoint_files("ann", *path)
        await client.archive("ann", *path)
        await client.set_keep_last("ann", run.run_id, 3)
        source = {"source_path": f"tinker://{'/'.join(other)}", "destination_project_id": "blue"}
        await client.copy_weights("ann", source)
        await client.set_project("ann", run.session_id, "blue")
        await client.adopt_upload("ann", await _upload(stack), _SWITCHES)
        await client.delete_checkpoint("ann", *path)
        with pytest.raises(NotFound):
            await client.publish("ann", *path)
        await admin("POST", f"/runs/{run.run_id}/move", body={"to": "t1"})
        await admin("POST", "/trainers/t0/drain")
        await admin("DELETE", "/trainers/t0/drain")
        with pytest.raises(NotFound):
            await admin("POST", "/trainers/none/drain")
        await admin("POST", "/jobs/lists")
    finally:
        CALLER.reset(token)
    answer = await client.admin("GET", "/audit?day=2026-01-02", "ann")
    found = Counter(
        (entry["event"], entry["event_details"]["outcome"]) for entry in answer["entries"]
    )
    twice = {"organizations.create_key", "organizations.revoke_key", "checkpoints.download"}
    expected = {(event, "ok"): 2 if event in twice else 1 for event in set(EVENTS.values())}
    refused = {("checkpoints.publish", "NotFound"): 1, ("organizations.drain", "NotFound"): 1}
    assert found == {**expected, **refused}
    assert {entry["event_details"]["actor"] for entry in answer["entries"]} == {"0123456789ab"}
    (published,) = [e for e in answer["entries"] if e["event"] == "checkpoints.unpublish"]
    assert published["tinker_path"] == f"tinker://{run.run_id}/weights/x"
    assert (await client.admin("GET", "/audit?day=2026-01-02", "bob"))["entries"] == []
    print(f"S18: {found.total()} audited calls of {len(EVENTS)} kinds, one entry each")


_HEADER = {
    **{"tenant": "ann", "base_model": "tiny", "facts": "{}", "status": "active", "owner": "t0/1"},
    **dict.fromkeys(("epoch", "admitted", "committed"), 0),
    "told": -1,
}
_SWITCHES = {"train_attn": True, "train_mlp": False, "train_unembed": False}


async def _upload(stack: Stack) -> str:
    """The id of one whose weights have come."""
    wanted = {"base_model": "tiny", "adapter_config": {"r": 4}, "num_bytes": 1, "name": "u"}
    upload = await stack.client.create_upload("ann", {**wanted, "sha256": "0" * 64})
    prefix = keys.checkpoint_prefix("ann", upload.run_id, 0, 0)
    await stack.blobs.put(f"{prefix}adapter_model.safetensors", b"x")
    return upload.upload_id


async def test_audit_shows_one_day_and_one_type(stack: Stack) -> None:
    for _ in range(5):
        await _org(stack)  # the same each time: every call is an event
        await stack.client.admin(
            "POST", "/orgs/acme/projects", body={"project_id": "blue"}, tenant="acme"
        )
        stack.clock.now += timedelta(days=1)

    async def events(query: str) -> list[str]:
        answer = await stack.client.admin("GET", f"/audit?{query}", "acme")
        return [entry["event"] for entry in answer["entries"]]

    assert await events("day=2026-01-04") == ["organizations.create", "projects.create"]
    assert await events("day=2026-01-04&event_type=projects") == ["projects.create"]
    assert await events("day=2026-02-04") == []
    for wrong in ("day=yesterday", "day=2026-01-04&event_type=x"):
        with pytest.raises(InvalidField):
            await events(wrong)


async def test_a_changed_missing_or_cut_audit_log_is_noticed_every_time(stack: Stack) -> None:
    """100 edits of a log of 20 entries: all are found (reliability S18)."""
    audit = Audit(stack.blobs, stack.valkey, stack.config.secret(), clock=stack.clock)
    for number in range(20):
        await audit.append(
            "acme", "projects.create", actor="", outcome="ok", details={"project": str(number)}
        )
    assert (await audit.verify("acme")).broken_at is None
    rng = random.Random(3)
    found = 0
    for attempt in range(100):
        key = keys.audit_entry("acme", rng.randrange(20))
        before = await stack.blobs.get(key)
        if attempt % 4 == 0:
            await stack.blobs.delete(key)
        elif attempt % 4 == 1:
            other = await stack.blobs.get(keys.audit_entry("acme", rng.randrange(20)))
            await stack.blobs.put(key, other + b" ")
        else:
            changed = json.loads(before)
            changed[rng.choice(("actor", "outcome", "seal", "prev"))] += "0"
            await stack.blobs.put(key, json.dumps(changed).encode())
        found += (await audit.verify("acme")).broken_at is not None
        await stack.blobs.put(key, before)
    assert found == 100
    assert (await audit.verify("acme")).broken_at is None


async def test_two_registries_append_to_one_chain(stack: Stack) -> None:
    secret = stack.config.secret()
    first, second = [Audit(stack.blobs, stack.valkey, secret, clock=stack.clock) for _ in range(2)]
    for number in range(6):
        writer = first if number % 2 else second
        entry = await writer.append("acme", "a.b", actor="", outcome="ok", details={})
        assert entry.number == number
    assert await Audit(stack.blobs, stack.valkey, secret, clock=stack.clock).verify(
        "acme"
    ) == await first.verify("acme")
    assert (await first.verify("acme")).broken_at is None
