"""sessions/search: the sessions of one tenant that fit, latest first (wire protocol 8.4)."""

import math
from datetime import datetime
from typing import Any

from luthier_core.errors import NotFound
from luthier_core.listing import Listing
from luthier_core.records import as_strings
from luthier_registry.requests import SearchSessions, StatusQuery

BATCH_ROWS = 500
MAX_SCANNED_ROWS = 20_000
"""Of one request; a search that finds little goes on with the cursor."""

OWNER_PREFIX = "luthier:tenant:"


async def search_sessions(listing: Listing, tenant: str, wanted: SearchSessions) -> dict[str, Any]:
    """One page of SessionSummary objects and the cursor of the next, null at the end.

    The last rows of one request may be fewer than asked for, with a cursor. NotFound if another
    owner is named: users come with organisations, and until then a tenant sees its own.
    """
    owner = OWNER_PREFIX + tenant
    if wanted.owner.type == "user" and owner not in wanted.owner.owner_urns:
        raise NotFound(f"owner_urns={wanted.owner.owner_urns}")
    time_s, session_id = math.inf, ""
    if wanted.cursor is not None:
        time_s = wanted.cursor.last_created_at.timestamp()
        session_id = wanted.cursor.last_session_id
    found: list[dict[str, Any]] = []
    num_scanned, row = 0, None
    while len(found) < wanted.limit and num_scanned < MAX_SCANNED_ROWS:
        rows = await listing.sessions_from(time_s, session_id, num_rows=BATCH_ROWS)
        if not rows:
            return {"sessions": await _summaries(listing, owner, found), "next_cursor": None}
        for row in rows:
            num_scanned += 1
            time_s = datetime.fromisoformat(row["created_at"]).timestamp()
            session_id = row["session_id"]
            if _fits(row, wanted):
                found.append(row)
                if len(found) == wanted.limit:
                    break
    assert row is not None
    cursor = {"last_created_at": row["created_at"], "last_session_id": row["session_id"]}
    return {"sessions": await _summaries(listing, owner, found), "next_cursor": cursor}


def _fits(row: dict[str, Any], wanted: SearchSessions) -> bool:
    metadata = as_strings(row["user_metadata"]) or {}
    return (
        (wanted.project_ids is None or row["project_id"] in wanted.project_ids)
        and all(metadata.get(name) == value for name, value in wanted.user_metadata.items())
        and _is_named(row, wanted)
        and (wanted.statuses is None or any(_has_status(row, one) for one in wanted.statuses))
    )


def _is_named(row: dict[str, Any], wanted: SearchSessions) -> bool:
    """With both an id and a name, one of them is enough."""
    if wanted.session_id is None and wanted.display_name is None:
        return True
    name = (row["display_name"] or "").casefold()
    words = (wanted.display_name or "").casefold().split()
    return row["session_id"] == wanted.session_id or (
        bool(words) and all(word in name for word in words)
    )


def _has_status(row: dict[str, Any], wanted: StatusQuery) -> bool:
    if wanted.type == "client_finished":
        reasons = wanted.reasons
        return row["status"] == "finished" and (not reasons or row["finish_reason"] in reasons)
    # Nothing here cancels or fails a session.
    return bool(wanted.type == "active" and row["status"] == "active")


async def _summaries(
    listing: Listing, owner: str, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    counts = await listing.num_checkpoints([row["session_id"] for row in rows])
    return [
        {
            "session_id": row["session_id"],
            "created_at": row["created_at"],
            "owner": owner,
            "project_id": row["project_id"] or "",
            "status": _status(row),
            "checkpoints_count": count,
            "display_name": row["display_name"],
            "user_metadata": as_strings(row["user_metadata"]),
        }
        for row, count in zip(rows, counts, strict=True)
    ]


def _status(row: dict[str, Any]) -> dict[str, Any]:
    if row["status"] == "active":
        return {"type": "active"}
    reason = {"type": row["finish_reason"]}
    return {"type": "client_finished", "reason": reason, "detail": row["finish_detail"]}
