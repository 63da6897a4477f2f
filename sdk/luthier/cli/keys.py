"""luthier key: the key in use, and the keys of its organisation."""

import os
from typing import Annotated, Any

import typer

from luthier.cli import admin
from luthier.cli.remote import REFUSED, JsonOption, fail

app = typer.Typer(no_args_is_help=True, help="API keys.")
OrgOption = Annotated[
    str, typer.Option(metavar="ORG", help="Whose. [default: the organisation of the key in use]")
]


@app.callback()
def connection(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="Gateway. [default: TINKER_BASE_URL]")] = "",
) -> None:
    """API keys. The key in use is LUTHIER_ADMIN_KEY, else TINKER_API_KEY."""
    key = os.environ.get("LUTHIER_ADMIN_KEY") or os.environ.get("TINKER_API_KEY")
    if not key:
        fail("set TINKER_API_KEY, or LUTHIER_ADMIN_KEY for what only that may do", REFUSED)
    context.obj = admin.Gateway(url, None, key)


@app.command()
def info(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show the key in use: its name, and whose it is."""
    answer = _own(context)
    # The wire has a number; `list` and `revoke` know the key by the same in hexadecimal.
    key_id = f"{answer['key_id']:012x}"
    shown = {"key_id": key_id, "name": answer["name"], "org": _org_of(answer)}
    admin.show(answer if as_json else shown, as_json)


@app.command("list")
def list_keys(context: typer.Context, org: OrgOption = "", as_json: JsonOption = False) -> None:
    """Show the keys by their ids. Needs the scope admin."""
    admin.list_keys(context, org or _org_of(_own(context)), as_json)


@app.command()
def create(
    context: typer.Context,
    org: OrgOption = "",
    name: Annotated[str, typer.Option(help="For people.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="read, train, sample or admin; may be repeated.")
    ] = None,
    project: Annotated[str, typer.Option(help="What it creates belongs to this project.")] = "",
    user: Annotated[str, typer.Option(help="Whose key it is.")] = "",
    days: admin.DaysOption = 0,
    limit: admin.LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is printed once and kept nowhere. Needs the scope admin."""
    org = org or _org_of(_own(context))
    admin.create_key(context, org, name, scope, project, user, days, limit, as_json)


@app.command()
def revoke(
    context: typer.Context, key_id: str, org: OrgOption = "", as_json: JsonOption = False
) -> None:
    """End a key for good, everywhere within 60 seconds. Needs the scope admin."""
    admin.revoke_key(context, org or _org_of(_own(context)), key_id, as_json)


def _own(context: typer.Context) -> dict[str, Any]:
    answer: dict[str, Any] = context.obj.call("GET", "/auth/apikey/me")
    return answer


def _org_of(answer: dict[str, Any]) -> str:
    return str(answer["details"]["org_details"]["name"])
