"""model_id and seq_id of a training request whose body cannot be read as a whole."""

import re
from typing import TypeGuard

import orjson

from luthier_core.part_limits import read_varint

_MODEL_ID_TAG = 0x0A  # field 1, length-delimited
_SEQ_ID_TAG = 0x10  # field 2, varint


_MEMBER = rb'\s*"[^"\\]{1,64}"\s*:\s*(?:"[^"\\]{0,256}"|-?\d{1,19}|true|false|null)\s*'
_FIRST_MEMBERS = re.compile(rb"\s*\{(" + _MEMBER + rb"(?:," + _MEMBER + rb")*),")
_LAST_MEMBERS = re.compile(rb"((?:," + _MEMBER + rb"){1,16})\}\s*\Z")


def read_json_ids(head: bytes, tail: bytes) -> tuple[str, int] | None:
    """(model_id, seq_id) among the plain members at both ends of a JSON object.

    SDKs up to 0.24.1 write them last, after the data; only there is it certain that a member is the
    request's own and no nested one. None if they are not there.
    """
    members: dict[str, object] = {}
    for found in (_FIRST_MEMBERS.match(head), _LAST_MEMBERS.search(tail)):
        if found is not None:
            try:
                members |= orjson.loads(b"{" + found[1].strip(b", ") + b"}")
            except orjson.JSONDecodeError:  # no UTF-8
                return None
    model_id, seq = members.get("model_id"), members.get("seq_id")
    return (model_id, seq) if isinstance(model_id, str) and _is_seq(seq) else None


def read_protobuf_ids(head: bytes) -> tuple[str, int] | None:
    """(model_id, seq_id), which the SDK writes first; None if the bytes do not begin with them."""
    try:
        if head[0] != _MODEL_ID_TAG:
            return None
        length, at = read_varint(head, 1)
        model_id = head[at : at + length].decode()
        at += length
        if head[at] != _SEQ_ID_TAG:
            return None
        seq, _ = read_varint(head, at + 1)
    except (IndexError, UnicodeDecodeError):
        return None
    return (model_id, seq) if _is_seq(seq) else None


def _is_seq(value: object) -> TypeGuard[int]:
    return type(value) is int and 1 <= value < 2**31
