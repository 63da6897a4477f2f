"""`luthier admin`: organisations, projects, users and keys, usage, queues, housekeeping."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from luthier.cli.remote import (
    REFUSED,
    UNREACHABLE,
    WRONG_USE,
    JsonOption,
    fail,
    show_json,
    show_table,
)

TIMEOUT_S = 60.0

app = typer.Typer(help="Administer a deployment.", no_args_is_help=True)
org_app = typer.Typer(help="Organisations: the tenants.", no_args_is_help=True)
project_app = typer.Typer(help="Projects of an organisation.", no_args_is_help=True)
user_app = typer.Typer(help="Users of an organisation.", no_args_is_help=True)
key_app = typer.Typer(help="API keys of an organisation.", no_args_is_help=True)
for _name, _part in (
    ("org", org_app),
    ("project", project_app),
    ("user", user_app),
    ("key", key_app),
):
    app.add_typer(_part, name=_name)

LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=NUMBER",
        help="requests_per_s, queued_bytes, concurrent_runs, trained_tokens_per_day, "
        "sampled_tokens_per_day, stored_bytes or usd_per_month; may be repeated.",
    ),
]
DaysOption = Annotated[
    int, typer.Option(min=0, max=3660, help="How long it works; 0: until it is revoked.")
]


@app.callback()
def connection(
    context: typer.Context,
    url: Annotated[
        str, typer.Option(help="Gateway. [default: TINKER_BASE_URL, or the stack in --data]")
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of a stack on this machine, with its admin key."),
    ] = None,
) -> None:
    """Administer a deployment. The key is LUTHIER_ADMIN_KEY, or the one that `luthier up` made."""
    context.obj = Gateway(url, data)


class Gateway:
    """Where to ask, and with which key; looked up when the first call is made."""

    def __init__(self, url: str, data: Path | None, api_key: str = "") -> None:
        self._url = url
        self._data = data
        self._api_key = api_key

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of a good answer; exits with the server's sentence otherwise."""
        request = urllib.request.Request(
            f"{self._base()}/api/v1{path}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"X-API-Key": self._key(), "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                data = response.read()
                is_json = response.headers.get_content_type() == "application/json"
                return json.loads(data) if is_json else data.decode()
        except urllib.error.HTTPError as error:
            with error:
                fail(_sentence(error.read()) or f"the gateway answered {error.code}", REFUSED)
        except (urllib.error.URLError, TimeoutError) as error:
            fail(f"no gateway at {self._base()}: {error}", UNREACHABLE)

    def _base(self) -> str:
        url = self._url or os.environ.get("TINKER_BASE_URL", "") or self._file("endpoint")
        if not url.startswith(("http://", "https://")):
            fail("give --url http://HOST:PORT, or --data DIR of a running stack", REFUSED)
        return url.rstrip("/")

    def _key(self) -> str:
        key = self._api_key or os.environ.get("LUTHIER_ADMIN_KEY", "") or self._file("admin-key")
        if not key:
            fail("set LUTHIER_ADMIN_KEY, or give --data DIR of a stack on this machine", REFUSED)
        return key

    def _file(self, name: str) -> str:
        from luthier.up.options import default_data_dir

        path = (self._data or default_data_dir(os.environ)) / name
        return path.read_text().strip() if path.exists() else ""


# --- organisations, projects, users ---------------------------------------------------------------


@org_app.command("create")
def create_org(
    context: typer.Context,
    org: str,
    name: Annotated[str, typer.Option(help="For people.")] = "",
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an organisation."""
    body = {"org_id": org, "name": name, "limits": limits(limit)}
    show(context.obj.call("POST", "/admin/orgs", body), as_json)


@org_app.command("list")
def list_orgs(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show every organisation."""
    columns = ("org_id", "name", "disabled", "limits")
    table(context.obj.call("GET", "/admin/orgs"), "orgs", columns, as_json)


@org_app.command("set")
def update_org(
    context: typer.Context,
    org: str,
    limit: LimitOption = None,
    no_limits: Annotated[bool, typer.Option("--no-limits", help="Take all limits away.")] = False,
    disabled: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Whether its keys are refused.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Change limits of an organisation (NAME=null takes one away), or disable it."""
    body: dict[str, Any] = {}
    if limit or no_limits:
        kept = {} if no_limits else context.obj.call("GET", _org(org))["limits"]
        body["limits"] = {**kept, **limits(limit)}
    if disabled is not None:
        body["disabled"] = disabled
    show(context.obj.call("PATCH", _org(org), body), as_json)


@project_app.command("create")
def create_project(
    context: typer.Context, org: str, project: str, name: str = "", as_json: JsonOption = False
) -> None:
    """Make a project."""
    body = {"project_id": project, "name": name}
    show(context.obj.call("POST", f"{_org(org)}/projects", body), as_json)


@project_app.command("list")
def list_projects(context: typer.Context, org: str, as_json: JsonOption = False) -> None:
    """Show the projects of an organisation."""
    answer = context.obj.call("GET", f"{_org(org)}/projects")
    table(answer, "projects", ("project_id", "name", "created_at"), as_json)


@user_app.command("create")
def create_user(
    context: typer.Context,
    org: str,
    user: str,
    email: str,
    name: str = "",
    as_json: JsonOption = False,
) -> None:
    """Make a user."""
    body = {"user_id": user, "email": email, "name": name}
    show(context.obj.call("POST", f"{_org(org)}/users", body), as_json)


@user_app.command("list")
def list_users(context: typer.Context, org: str, as_json: JsonOption = False) -> None:
    """Show the users of an organisation."""
    answer = context.obj.call("GET", f"{_org(org)}/users")
    table(answer, "users", ("user_id", "email", "name"), as_json)


@user_app.command("delete")
def delete_user(context: typer.Context, org: str, user: str, as_json: JsonOption = False) -> None:
    """Take a user away and end all their keys."""
    show(context.obj.call("DELETE", f"{_org(org)}/users/{quote(user, safe='')}"), as_json)


# --- keys -----------------------------------------------------------------------------------------


@key_app.command("create")
def create_key(
    context: typer.Context,
    org: str,
    name: Annotated[str, typer.Option(help="For people.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, train, sample, admin or operator; may be repeated."),
    ] = None,
    project: Annotated[str, typer.Option(help="What it creates belongs to this project.")] = "",
    user: Annotated[str, typer.Option(help="Whose key it is.")] = "",
    days: DaysOption = 0,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an API key. It is printed once and kept nowhere."""
    body = {
        "name": name,
        "scopes": scope,
        "project_id": project or None,
        "user_id": user or None,
        "expires_in_days": days or None,
        "limits": limits(limit),
    }
    given = {field: value for field, value in body.items() if value is not None}
    show(context.obj.call("POST", f"{_org(org)}/keys", given), as_json)


@key_app.command("list")
def list_keys(context: typer.Context, org: str, as_json: JsonOption = False) -> None:
    """Show the keys of an organisation by their ids."""
    whose = ("key_id", "name", "scopes", "project_id", "user_id")
    columns = (*whose, "limits", "expires_at", "revoked_at")
    table(context.obj.call("GET", f"{_org(org)}/keys"), "keys", columns, as_json)


@key_app.command("revoke")
def revoke_key(context: typer.Context, org: str, key_id: str, as_json: JsonOption = False) -> None:
    """End a key for good, everywhere within 60 seconds."""
    show(context.obj.call("DELETE", f"{_org(org)}/keys/{quote(key_id, safe='')}"), as_json)


@app.command("audit-check")
def check_audit(context: typer.Context, org: str, as_json: JsonOption = False) -> None:
    """Read the whole audit log of an organisation: exit 1 if an entry was changed or is missing."""
    answer = context.obj.call("GET", f"{_org(org)}/audit/check")
    show(answer, as_json)
    raise typer.Exit(0 if answer["intact"] else 1)


# --- usage, queues, housekeeping ------------------------------------------------------------------


@app.command("usage")
def usage(
    context: typer.Context,
    org: str,
    by: Annotated[str, typer.Option(help="run, session, key or project.")] = "project",
    days: Annotated[int, typer.Option(min=1, max=13, help="Up to now.")] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print rows of text.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an organisation has used, and what that costs."""
    end = datetime.now(UTC) + timedelta(hours=1)
    start = end - timedelta(days=days)
    query = f"by={quote(by)}&starting_on={start:%Y-%m-%dT%H:00}&ending_before={end:%Y-%m-%dT%H:00}"
    answer = context.obj.call("GET", f"{_org(org)}/usage?{query}{'&format=csv' if as_csv else ''}")
    if as_csv:
        typer.echo(answer, nl=False)
        return
    columns = ("trained_tokens", "prefill_tokens", "cached_tokens", "sampled_tokens", "cost_usd")
    table(answer, "rows", (by, *columns), as_json)


@app.command("queues")
def queues(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show every run that waits: for what, since when, and which worker has it."""
    answer = context.obj.call("GET", "/admin/queues")
    rows = [row for model in answer["models"] for row in model["runs"]]
    columns = ("run_id", "org_id", "num_queued", "since_s", "worker", "waits_for")
    if as_json:
        show_json(answer)
    else:
        table({"runs": rows}, "runs", columns, as_json=False)


@app.command("jobs")
def jobs(
    context: typer.Context,
    run: Annotated[str, typer.Option(metavar="JOB", help="Run this one now.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Show when each housekeeping job ran last and what it did."""
    if run:
        show(context.obj.call("POST", f"/admin/jobs/{quote(run, safe='')}"), as_json)
        return
    columns = ("job", "every_s", "at", "seconds", "did", "error")
    table(context.obj.call("GET", "/admin/jobs"), "jobs", columns, as_json)


@app.command("move-run")
def move_run(
    context: typer.Context,
    run_id: str,
    to: Annotated[str, typer.Option(metavar="TRAINER", help="Which one; else any other.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Let another trainer have a run. Nothing of it is lost or executed again."""
    body = {"to": to or None}
    show(context.obj.call("POST", f"/admin/runs/{quote(run_id, safe='')}/move", body), as_json)


@app.command("drain")
def drain(
    context: typer.Context,
    trainer: str,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take runs again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let other trainers have all runs of one, which takes no more."""
    path = f"/admin/trainers/{quote(trainer, safe='')}/drain"
    show(context.obj.call("DELETE" if undo else "POST", path), as_json)


@app.command("rebuild-index")
def rebuild_index(context: typer.Context, as_json: JsonOption = False) -> None:
    """Make every list and header in Redis again from the object store."""
    show(context.obj.call("POST", "/admin/jobs/rebuild-index"), as_json)


# --- plumbing -------------------------------------------------------------------------------------


def limits(texts: Sequence[str] | None) -> dict[str, float | None]:
    """NAME=NUMBER, several."""
    found = {}
    for text in texts or ():
        name, _, number = text.partition("=")
        try:
            found[name] = json.loads(number)
        except ValueError:
            fail(f"--limit {text!r}: expected NAME=NUMBER", WRONG_USE)
    return found


def table(answer: Any, field: str, columns: Sequence[str], as_json: bool) -> None:
    """Rows of an answer for people, or the answer for programs."""
    if as_json:
        show_json(answer)
    else:
        show_table(columns, [[_cell(row.get(name)) for name in columns] for row in answer[field]])


def show(answer: dict[str, Any], as_json: bool) -> None:
    """One thing: a line per field for people, or the answer for programs."""
    if as_json:
        show_json(answer)
    else:
        show_table(("", ""), [(name, _cell(value)) for name, value in answer.items()])


def _org(org: str) -> str:
    return f"/admin/orgs/{quote(org, safe='')}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_cell(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, float):
        return f"{value:.9g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sentence(body: bytes) -> str:
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return ""
