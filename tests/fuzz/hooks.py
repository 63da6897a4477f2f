"""Puts ids that exist into about half of the generated requests, and makes protobuf bodies.

Loaded by schemathesis.
"""

import base64
import json
import os
from typing import Any

import schemathesis
from hypothesis import strategies as st

REAL: dict[str, list[str]] = json.loads(os.environ["FUZZ_IDS"])
"""Name of a parameter or field -> values that exist."""


def with_real_ids(values: Any, choose: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        name: choose(st.sampled_from(REAL[name]))
        if name in REAL and choose(st.booleans())
        else item
        for name, item in values.items()
    }


@st.composite
def often_real(draw: Any, strategy: Any) -> Any:
    return with_real_ids(draw(strategy), draw)


@schemathesis.hook
def before_generate_path_parameters(context: Any, strategy: Any) -> Any:
    return often_real(strategy)


@schemathesis.hook
def before_generate_body(context: Any, strategy: Any) -> Any:
    return often_real(strategy)


@st.composite
def damaged(draw: Any) -> bytes:
    """A good forward_backward with bytes changed, taken out or put in."""
    body = bytearray(base64.b64decode(draw(st.sampled_from(REAL["forward_backward"]))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(body)))
        end = at + draw(st.integers(0, 4))
        body[at:end] = draw(st.binary(max_size=8))
    return bytes(body)


schemathesis.openapi.media_type("application/x-protobuf", damaged() | st.binary())


@schemathesis.serializer("application/x-protobuf")
def as_it_is(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
