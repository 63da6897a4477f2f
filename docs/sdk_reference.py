"""Writes docs/sdk-reference.md, the reference of our own client, from its docstrings.

    python docs/sdk_reference.py            # `make reference`

Names, signatures and sentences are those of the code: to change a line of the page, change the
docstring. A test compares the page with what this would write.
"""

import enum
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import luthier
from luthier import data, errors, metrics, types

PAGE = Path(__file__).with_name("sdk-reference.md")
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "APIFuture")
HEAD = """# Reference of the client

Made from the docstrings by `make reference`; do not edit. [The README](../sdk/README.md) says how
the client behaves, [migration](migration.md) how it differs from the official one.

Operations return an `APIFuture`: `.result(timeout)` in a thread, `await` in a coroutine. A name
with `_async` is the same operation for coroutines: the same arguments, the same errors. Times are
seconds, log probabilities nats.

All operations raise `RequestFailedError` if the server executed a request and it failed,
`APIStatusError` if it refused one, `APIConnectionError` if it cannot be reached for long, and
`ClosedError` once the client is closed. What else one raises is told with it.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name in CLIENTS:
        parts += [f"## {name}\n", _text(getattr(luthier, name)), *_methods(name)]
    parts += ["## luthier.data\n", _text(data), *_functions("data", data)]
    parts += ["## Progress and metrics\n", *_entry("progress", luthier.progress)]
    for name in ("MetricsLog", "WandbConfig"):
        parts += _entry(name, getattr(luthier, name))
    parts += _entry("metrics.read_metrics", metrics.read_metrics)
    parts += ["## Types\n", _text(types)]
    for name in types.__all__:
        parts += _type(name)
    parts += ["## Errors\n", f"```\n{_text(errors).strip()}\n```\n"]
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, Exception):
            parts.append(f"* `{name}`: {' '.join(_text(value).split())}")
    return "\n".join(parts).rstrip() + "\n"


def _methods(client: str) -> Iterator[str]:
    cls = getattr(luthier, client)
    names = [name for name in dir(cls) if not name.startswith("_")]
    for name in sorted(names, key=lambda name: name.removesuffix("_async")):
        base = name.removesuffix("_async")
        if name != base and base in names:
            continue  # told with its plain form
        both = f" and `{name}_async`" if f"{name}_async" in names else ""
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property):
            yield f"### {client}.{name}\n\n{_text(value)}"
        else:
            function = getattr(cls, name)
            yield f"### {client}.{name}{both}\n\n{_signature(name, function)}\n{_text(function)}"


def _functions(prefix: str, module: Any) -> Iterator[str]:
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield from _entry(f"{prefix}.{name}", value)


def _entry(name: str, value: Any) -> Iterator[str]:
    yield f"### {name}\n\n{_signature(name.rpartition('.')[2], value)}\n{_text(value)}"


def _type(name: str) -> Iterator[str]:
    value = getattr(types, name)
    if not inspect.isclass(value):
        yield f"* `{name}` = `{_clean_once(value)}`\n"
        return
    yield f"### {name}\n\n{_text(value)}"
    if issubclass(value, enum.Enum):
        yield f"One of {', '.join(f'`{member.value}`' for member in value)}.\n"
    elif issubclass(value, BaseModel):
        for field, info in value.model_fields.items():
            default = "" if info.is_required() else f" = {info.get_default()!r}"
            yield f"* `{field}: {_clean(info.annotation)}{default}`"
        yield ""
    else:
        yield _signature(name, value)


def _signature(name: str, value: Any) -> str:
    try:
        signature = str(inspect.signature(value, eval_str=False))
    except (TypeError, ValueError):
        return ""
    if inspect.iscoroutinefunction(getattr(value, "__wrapped__", None)):  # an @operation
        signature = re.sub(r" -> (.*)$", r" -> APIFuture[\1]", signature)
    text = _clean(f"{name}{signature}").replace("(self, ", "(").replace("(self)", "()")
    return f"```python\n{text}\n```\n"


def _clean(value: Any) -> str:
    """Types as one writes them."""
    text = _clean_once(value)
    for spelled, name in _aliases().items():
        text = text.replace(f"Optional[{spelled}]", f"{name} | None").replace(spelled, name)
    return text


def _clean_once(value: Any) -> str:
    text = inspect.formatannotation(value) if not isinstance(value, str) else value
    text = text.replace("<factory>", "...")
    text = re.sub(r"Annotated\[([^\[\]]+), FieldInfo\((?:[^()]|\([^()]*\))*\)\]", r"\1", text)
    text = re.sub(r"Optional\[([^\[\]]+)\]", r"\1 | None", text)
    text = re.sub(r"\b(luthier(_core)?|collections|numpy|pydantic)(\.\w+)*\.(?=\w)", "", text)
    return text.replace("typing.", "").replace("'", '"').replace("NoneType", "None")


@cache
def _aliases() -> dict[str, str]:
    """How a type that has a name of its own is spelled -> that name, the longest first."""
    named = {name: getattr(types, name) for name in types.__all__}
    spelled = {
        _clean_once(value): name for name, value in named.items() if not inspect.isclass(value)
    }
    return dict(sorted(spelled.items(), key=lambda item: -len(item[0])))


def _text(value: Any) -> str:
    return (inspect.getdoc(value) or "") + "\n"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
