"""Names and tinker:// paths that would lead elsewhere (reliability S5)."""

import random
import re

from tests.malicious.harness import Family, Guard

from luthier_core import checkpoints
from luthier_core.checkpoints import TinkerPath

RUN = "0" * 32 + ":train:0"


def check(name: str) -> object:
    if "://" in name:
        return TinkerPath.parse(name)
    return checkpoints.check_name(name)


def _word(rng: random.Random, alphabet: str = "abcXYZ019", most: int = 8) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(1, most)))


def _with(rng: random.Random, wrong: str) -> str:
    word = _word(rng)
    at = rng.randrange(1, len(word) + 1)
    return word[:at] + rng.choice(wrong) + word[at:]


NAMES = Family(
    name="S5 names",
    check=check,
    good=lambda: "step-100",
    classes={
        "traversal": lambda rng: "../" * rng.randint(1, 9) + _word(rng),
        "slashes": lambda rng: _with(rng, "/\\"),
        "NUL and control": lambda rng: _with(rng, "\0\a\b\n\r\t\x1b\x7f"),
        "unicode": lambda rng: _with(rng, "é\u202e\u2215\uff0f\u0661ſ"),
        "shell and URL": lambda rng: _with(rng, "%?#&;|$`'\"<>*!~^{}[]() "),
        "too long": lambda rng: _word(rng) * rng.randint(129, 10_000),
        "empty and dots": lambda rng: rng.choice(["", ".", "..", "...", " ", "-", "_", "=x", "+x"]),
        "newline at the end": lambda rng: _word(rng) + "\n",
        "kinds of paths": lambda rng: f"tinker://{RUN}/{_word(rng)}/x",
        "parts of paths": lambda rng: f"tinker://{RUN}" + "/weights" * rng.choice([0, 1, 3, 9]),
        "runs of paths": lambda rng: f"tinker://{_with(rng, '%?# é')}/weights/x",
        "schemes": lambda rng: f"{rng.choice(['file', 'http', 's3', ''])}://{RUN}/weights/x",
    },
    guards={
        "names": Guard(checkpoints, "_NAME", re.compile(r"(?s).*"), lets_in="slashes"),
        "runs": Guard(checkpoints, "_RUN_ID", re.compile(r"(?s).*"), lets_in="runs of paths"),
        "kinds": Guard(
            checkpoints,
            "PATH_KINDS",
            type("Any", (tuple,), {"__contains__": lambda *_: True})(),
            lets_in="kinds of paths",
        ),
    },
    num_inputs=600,
)
