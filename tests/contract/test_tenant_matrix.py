"""Every route x every sort of id x callers who may not: nothing is told, nothing changes.

Reliability S2. The calls are made from the route table, so a new route fails until it is covered.
"""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

import aiohttp
import pytest
from aiohttp import web
from tests.contract import tenant_cases
from tests.contract.gateway_client import Answer, Api
from tests.contract.gateway_stack import KEYS, GatewayStack
from tests.contract.tenant_cases import CASES, Request

from luthier_core import keys
from luthier_core.auth import key_hmac
from luthier_core.blobs import open_blobs
from luthier_core.records import SCOPES, ApiKeyRecord, OrgRecord
from luthier_gateway.access import NEEDS_ONE_OF
from luthier_gateway.app import needs_key, routes

CANARY = "canary-of-ann"
MIN_ATTEMPTS = 2000

GUARDED = {
    (route.method, tenant_cases.plain(route.path)): route
    for route in routes()
    if isinstance(route, web.RouteDef) and needs_key(route.path)
}


def test_every_route_is_covered() -> None:
    assert GUARDED.keys() == CASES.keys(), "a new route needs a line in tenant_cases.py"


@dataclass(slots=True)
class Tenants:
    """Ann with one of everything, and those who may not have it."""

    owner: Api
    operator: Api
    strangers: dict[str, Api]
    narrow: dict[str, Api]
    """Scope -> a key of Ann's that has all but this one."""
    ids: dict[str, str]

    @property
    def secrets(self) -> set[str]:
        """What only Ann may see."""
        told = ("session_id", "run_id", "sampler_id", "request_id", "sample_id", "key_id")
        return {CANARY, *(self.ids[name] for name in told)}


@pytest.fixture
async def tenants(
    gateway_stack: GatewayStack, http: aiohttp.ClientSession
) -> AsyncIterator[Tenants]:
    url = gateway_stack.url
    org = "ann-of-matrix"

    async def made(tenant: str, what: str, scopes: tuple[str, ...], **fields: object) -> Api:
        key = f"tml-matrix-{tenant}-{what}"
        record = ApiKeyRecord(tenant=tenant, scopes=scopes, created_at=datetime.now(UTC), **fields)
        path = keys.api_key_record(key_hmac(gateway_stack.config.secret(), key))
        await blobs.put(path, record.to_bytes())
        return Api(http, url, key)

    async with open_blobs(gateway_stack.config) as blobs:
        for name in (org, "bob"):
            record = OrgRecord(org_id=name, name=name, created_at=datetime.now(UTC))
            await blobs.put_if_absent(keys.org_record(name), record.to_bytes())
        owner = await made(org, "all", ("read", "train", "sample", "admin"), name=CANARY)
        operator = await made("root", "operator", ("operator",))
        strangers = {
            "other tenant": Api(http, url, KEYS["bob"]),
            "other tenant's admin": await made("bob", "admin", SCOPES[:-1]),
            "no key": Api(http, url, None),
            "revoked key": await made(org, "revoked", SCOPES, revoked_at=datetime.now(UTC)),
        }
        narrow = {
            scope: await made(org, f"not-{scope}", tuple(s for s in SCOPES[:-1] if s != scope))
            for scope in SCOPES[:-1]
        }
        yield Tenants(
            owner, operator, strangers, narrow, await tenant_cases.one_of_each(owner, org, CANARY)
        )


async def _send(api: Api, wanted: Request) -> Answer:
    return await api.call(wanted.method, api.url + wanted.path, wanted.body, allow_redirects=False)


def _leaks(answer: Answer, wanted: Request, secrets: set[str]) -> set[str]:
    """Secrets in an answer that were not in the request."""
    text = answer.body.decode(errors="replace") + str(dict(answer.headers))
    given = " ".join(wanted.given)
    return {secret for secret in secrets if secret in text and secret not in given}


async def test_who_may_not_learns_and_changes_nothing_and_the_owner_may(tenants: Tenants) -> None:
    attempts, wrong = 0, []
    for method, path in CASES:
        case, has_ids = CASES[method, path], bool(tenant_cases.id_names(method, path))
        for wanted in tenant_cases.substitutions(method, path, tenants.ids):
            for relation, api in tenants.strangers.items():
                if (method, path) == ("DELETE", "/api/v1/auth/apikey/me") and "other" in relation:
                    continue  # that would be their own
                answer = await _send(api, wanted)
                attempts += 1
                expected_401 = relation in ("no key", "revoked key")
                told = answer.status < 300 and has_ids and not case.ignores_unknown
                if (
                    _leaks(answer, wanted, tenants.secrets)
                    or told
                    or (expected_401 and answer.status != 401)
                    or answer.status >= 500
                ):
                    wrong.append((relation, wanted, answer))
        rule = NEEDS_ONE_OF[GUARDED[method, path].handler]
        for wanted in tenant_cases.substitutions(method, path, tenants.ids):
            for scope in rule - {"operator"} if len(rule - {"operator"}) == 1 else ():
                answer = await _send(tenants.narrow[scope], wanted)
                attempts += 1
                if answer.status not in (403, 404) or _leaks(answer, wanted, tenants.secrets):
                    wrong.append((f"without scope {scope}", wanted, answer))
    assert not wrong, f"{len(wrong)} of {attempts}: {wrong[:5]}"
    assert attempts >= MIN_ATTEMPTS, attempts
    print(f"{attempts} attempts of {len(CASES)} routes, 0 leaks")
    await _owner_may(tenants)


async def _owner_may(tenants: Tenants) -> None:
    """All is as it was: the owner's calls are answered, those that end something at the end."""
    refused = []
    for method, path in sorted(CASES, key=lambda route: CASES[route].turn):
        case = CASES[method, path]
        api = tenants.operator if case.operator else tenants.owner
        answer = await _send(api, tenant_cases.request(method, path, tenants.ids))
        if answer.status != case.status and not (case.status == 200 and answer.status == 302):
            refused.append((method, path, answer))
    assert not refused
    assert (await tenants.owner.get("training_runs")).status == 401  # its key was ended last


@pytest.mark.parametrize("path", ["training_runs/{run_id}", "sessions/{session_id}"])
async def test_a_foreign_id_is_answered_like_one_that_is_not_there(
    tenants: Tenants, path: str
) -> None:
    bob = tenants.strangers["other tenant"]
    session = tenants.ids["session_id"]
    mine = path.format(**tenants.ids)
    absent = mine.replace(session, "0" * 32)
    answers = [await bob.get(mine), await bob.get(absent)]
    assert [answer.status for answer in answers] == [404, 404]
    assert answers[0].detail.replace(session, "0" * 32) == answers[1].detail
    took: dict[str, list[float]] = {mine: [], absent: []}
    for number in range(400):
        asked = (mine, absent)[number % 2]
        began = time.perf_counter()
        await bob.get(asked)
        took[asked].append(1000 * (time.perf_counter() - began))
    apart_ms = abs(median(took[mine]) - median(took[absent]))
    print(f"S2: {path}: medians of 200 answers {apart_ms:.2f} ms apart")
