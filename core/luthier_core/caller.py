"""Who makes the request that this task works on, for calls that are made on the caller's behalf."""

from contextvars import ContextVar
from dataclasses import dataclass

from luthier_core.errors import LuthierError
from luthier_core.records import NO_LIMITS, Limits


@dataclass(frozen=True, slots=True)
class Caller:
    """An API key as it was presented."""

    tenant: str
    key_id: str
    scopes: frozenset[str]
    project_id: str | None = None
    """The key's project: what it creates belongs there."""
    key_limits: Limits = NO_LIMITS
    tenant_limits: Limits = NO_LIMITS

    @property
    def is_operator(self) -> bool:
        return "operator" in self.scopes


REFUSAL: ContextVar[LuthierError | None] = ContextVar("refusal", default=None)
"""Why the caller may start nothing more of this sort. A repeat of what was accepted is answered."""
CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
