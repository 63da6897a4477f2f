"""Malicious inputs by class, and the guards that refuse them.

An input is accepted if its check returns. With a guard taken out some class must be accepted:
otherwise the suite would not notice that the guard is gone.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from luthier_core.errors import LuthierError

MIN_CLASSES = 10
MIN_SHARE = 0.05
NUM_TRIES = 100

Generator = Callable[[random.Random], Any]


@dataclass(frozen=True, slots=True)
class Guard:
    """A function or limit of the product, and what stands there when it is taken out."""

    module: Any
    name: str
    instead: Any
    lets_in: str
    """Class of which an input is accepted without it."""
    also_in: tuple[Any, ...] = ()
    """Other modules that have imported the name."""


@dataclass(frozen=True, slots=True)
class Family:
    """Inputs for one entrance of the product."""

    name: str
    check: Callable[[Any], object]
    """Raises a LuthierError for an input that is refused."""
    good: Callable[[], Any]
    """An input that must be accepted: a check that refuses all would prove nothing."""
    classes: Mapping[str, Generator]
    guards: Mapping[str, Guard]
    num_inputs: int
    seed: int = 7

    def accepted_of(self, name: str, rng: random.Random) -> bool:
        """Whether the next input of a class is accepted."""
        try:
            self.check(self.classes[name](rng))
        except LuthierError:
            return False
        return True

    def verify(self) -> str:
        """One line of counts; AssertionError if one is accepted, or the mix is not as promised."""
        self.check(self.good())
        assert len(self.classes) >= MIN_CLASSES
        share = (self.num_inputs // len(self.classes)) / self.num_inputs
        assert share >= MIN_SHARE, share
        rng, names = random.Random(self.seed), list(self.classes)
        tried = [names[number % len(names)] for number in range(self.num_inputs)]
        accepted = Counter(name for name in tried if self.accepted_of(name, rng))
        assert not accepted, accepted
        return (
            f"{self.name}: {self.num_inputs} inputs in {len(self.classes)} classes of at least "
            f"{share:.1%}, 0 accepted, {len(self.guards)} guards"
        )

    def verify_guard(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """AssertionError unless an input is accepted once the guard is taken out."""
        guard = self.guards[name]
        for module in (guard.module, *guard.also_in):
            monkeypatch.setattr(module, guard.name, guard.instead)
        rng = random.Random(self.seed)
        try:
            found = any(self.accepted_of(guard.lets_in, rng) for _ in range(NUM_TRIES))
        except Exception:
            return  # what it let through broke what is behind it
        assert found, f"nothing is accepted without {name}"
