"""Usage, costs and metric histories, forwarded to the registry."""

from collections.abc import Sequence
from urllib.parse import urlencode

from aiohttp import web

from luthier_gateway.admin import caller, forward, org_path, part
from luthier_gateway.backends import BACKENDS, TENANT
from luthier_gateway.web_io import json_response, page_of


def routes(prefix: str) -> list[web.RouteDef]:
    return [
        web.get(f"{prefix}/billing/usage/events", usage_events),
        web.get(f"{prefix}/billing/usage/checkpoints/current", stored_checkpoints),
        web.get(f"{prefix}/training_runs/{{run_id}}/metrics", run_metrics),
        web.get(f"{prefix}/admin/orgs/{{org}}/usage", org_usage),
        web.get(f"{prefix}/admin/jobs", list_jobs),
        web.post(f"{prefix}/admin/jobs/{{job}}", run_job),
    ]


async def usage_events(request: web.Request) -> web.Response:
    """What was used in each hour, and what that costs by the server's price table."""
    query = _query(request, ("starting_on", "ending_before"))
    return await forward(request, "GET", f"/usage/events{query}")


async def stored_checkpoints(request: web.Request) -> web.Response:
    """How many checkpoints each project has, how large they are and what they cost a month."""
    return await forward(request, "GET", f"/usage/stored{_query(request, ('project_id',))}")


async def run_metrics(request: web.Request) -> web.Response:
    """The metrics of every op of a run, in order of seq; they are kept when its futures are not."""
    backends, run_id = request.app[BACKENDS], request.match_info["run_id"]
    await backends.registry.describe_run(request[TENANT], run_id)
    limit, _ = page_of(request, default_limit=100)
    query = urlencode({"after": request.query.get("after", "-1"), "limit": limit})
    return json_response(
        await backends.registry.admin("GET", f"/metrics/{run_id}?{query}", request[TENANT])
    )


async def org_usage(request: web.Request) -> web.Response:
    """Sums by run, session, key or project with their costs; as CSV with format=csv."""
    names = ("starting_on", "ending_before", "by", "format")
    path = f"{org_path(request)}/usage{_query(request, names)}"
    answer = await request.app[BACKENDS].registry.admin("GET", path, caller().tenant)
    if "csv" in answer:
        return web.Response(text=str(answer["csv"]), content_type="text/csv")
    return json_response(answer)


async def list_jobs(request: web.Request) -> web.Response:
    """When each housekeeping job ran last, what it did, and what went wrong."""
    return await forward(request, "GET", "/jobs")


async def run_job(request: web.Request) -> web.Response:
    """Run a housekeeping job now."""
    return await forward(request, "POST", f"/jobs/{part(request, 'job')}")


def _query(request: web.Request, names: Sequence[str]) -> str:
    given = {name: request.query[name] for name in names if name in request.query}
    return f"?{urlencode(given)}" if given else ""
