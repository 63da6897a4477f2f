"""The registry's calls about usage, metric histories and housekeeping."""

import csv
import io
from datetime import datetime
from typing import Any

from aiohttp import web

from luthier_core.errors import InvalidField, NotFound
from luthier_registry.usage import read_hours
from luthier_registry.web_io import IDENTITIES, JOBS, STORE, USAGE, page_of, tenant_of

_FORMULAS = ("=", "+", "-", "@")


def routes() -> list[web.RouteDef]:
    return [
        web.get("/admin/usage/events", usage_events),
        web.get("/admin/usage/stored", stored),
        web.get("/admin/orgs/{org}/usage", usage_table),
        web.get("/admin/metrics/{run}", metrics),
        web.get("/admin/jobs", list_jobs),
        web.post("/admin/jobs/{job}", run_job),
    ]


async def usage_events(request: web.Request) -> web.Response:
    start, end = _hours_of(request)
    return web.json_response(await request.app[USAGE].events(tenant_of(request), start, end))


async def stored(request: web.Request) -> web.Response:
    project = request.query.get("project_id")
    return web.json_response(await request.app[USAGE].stored(tenant_of(request), project))


async def usage_table(request: web.Request) -> web.Response:
    """Sums with costs; with format=csv the same rows as text."""
    start, end = _hours_of(request)
    group, form = request.query.get("by", "project"), request.query.get("format", "json")
    if form not in ("json", "csv"):
        raise InvalidField(f"format={form[:50]!r}: one of json, csv")
    org = request.match_info["org"]
    rows = await request.app[USAGE].table(org, start, end, group)
    if not rows:
        await request.app[IDENTITIES].org(org)  # NotFound
    answer: dict[str, Any] = {"by": group, "rows": rows}
    if form == "csv":
        answer["csv"] = _csv(rows)
    return web.json_response(answer)


async def metrics(request: web.Request) -> web.Response:
    """One page of a run's metric history; `offset` is the seq after which it begins."""
    run_id, tenant = request.match_info["run"], tenant_of(request)
    await request.app[STORE].run(tenant, run_id)
    after = request.query.get("after", "-1")
    if not after.lstrip("-").isdecimal() or len(after) > 12:
        raise InvalidField(f"after={after[:50]!r}: a seq is required")
    _, limit = page_of(request)
    page = await request.app[USAGE].metrics(tenant, run_id, after=int(after), limit=limit)
    return web.json_response(page)


async def list_jobs(request: web.Request) -> web.Response:
    """When each job ran last, and how it ended."""
    return web.json_response({"jobs": await request.app[JOBS].states()})


async def run_job(request: web.Request) -> web.Response:
    """Run a job now. All of them may be run at any time, also twice at once."""
    name = request.match_info["job"]
    if name not in request.app[JOBS].names:
        raise NotFound(f"job={name[:50]!r}: one of {', '.join(request.app[JOBS].names)}")
    return web.json_response(await request.app[JOBS].run(name))


def _hours_of(request: web.Request) -> tuple[datetime, datetime]:
    return read_hours(request.query.get("starting_on", ""), request.query.get("ending_before", ""))


def _csv(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    # A name that a spreadsheet would take for a formula is quoted by an apostrophe.
    writer.writerows(
        {
            name: f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value
            for name, value in row.items()
        }
        for row in rows
    )
    return text.getvalue()
