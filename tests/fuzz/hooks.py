"""Puts ids that exist into about half of the generated requests. Loaded by schemathesis."""

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
