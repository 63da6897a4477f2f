"""What has been used: kinds and amounts, how they are counted in Redis, and what they cost."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import Self

from luthier_core.config import Config

KINDS = ("train", "prefill", "cached", "sample", "storage")
"""Tokens, and of storage bytes times hours."""
BYTE_HOURS_PER_GB_MONTH = 1e9 * 730


@dataclass(frozen=True, slots=True)
class Use:
    """An amount of one kind, of a run or sampling session (or a key), on one base model."""

    subject: str
    kind: str
    base_model: str
    amount: int

    @classmethod
    def of_field(cls, field: str, amount: int) -> Self:
        subject, kind, base_model = field.split("|", 2)
        return cls(subject, kind, base_model, amount)

    @property
    def field(self) -> str:
        """Of the hash that it is counted in."""
        return f"{self.subject}|{self.kind}|{self.base_model}"


@dataclass(frozen=True, slots=True)
class SampleUse:
    """What one sample has used, and when and where: `str` of it is an Outcome.usage."""

    sampling_session_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    """Of the prompt."""
    num_sampled_tokens: int
    seq: str = ""
    """Empty, as all that follows, in what was written before there was more than the tokens."""
    queued_ms: int = 0
    begun_ms: int = 0
    """In ms since the epoch."""
    worker: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        session, prompt, cached, sampled, *more = text.split(" ", 7)
        seq, queued, begun, worker = more or ("", "0", "0", "")
        return cls(
            *(session, int(prompt), int(cached), int(sampled)),
            *(seq, int(queued), int(begun), worker),
        )

    def __str__(self) -> str:
        return " ".join(str(value) for value in astuple(self))


def read_uses(counted: Mapping[bytes, bytes]) -> list[Use]:
    """The fields of a usage hash."""
    return [Use.of_field(field.decode(), int(amount)) for field, amount in counted.items()]


def hour_of(at: datetime) -> str:
    return at.strftime("%Y%m%d%H")


def day_of(at: datetime) -> str:
    return at.strftime("%Y%m%d")


def month_of(at: datetime) -> str:
    return at.strftime("%Y%m")


class Prices:
    """The table of the configuration."""

    def __init__(self, config: Config) -> None:
        self._per_million = {
            (price.model, kind): getattr(price, kind)
            for price in config.prices
            for kind in ("train", "prefill", "cached", "sample")
        }
        self.usd_per_gb_month = config.storage_usd_per_gigabyte_month or None

    def per_million(self, kind: str, base_model: str) -> float | None:
        """USD per million tokens; None without a price."""
        price: float | None = self._per_million.get((base_model, kind))
        return price

    def cost(self, use: Use) -> float | None:
        """USD; None without a price."""
        if use.kind == "storage":
            price = self.usd_per_gb_month
            return None if price is None else price * use.amount / BYTE_HOURS_PER_GB_MONTH
        price = self.per_million(use.kind, use.base_model)
        return None if price is None else price * use.amount / 1e6

    def total(self, uses: Iterable[Use]) -> float:
        """USD of everything that has a price."""
        return sum(self.cost(use) or 0.0 for use in uses)
