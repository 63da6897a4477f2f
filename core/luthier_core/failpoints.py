"""Named points at which a test makes this process die, freeze, wait or fail.

Off, at the cost of one comparison, unless a test program calls `turn_on`: no setting of a
deployment does. A point lies directly before the step that it is named after.

Orders come one at a time in the file `order` of a folder that any number of processes share: point,
action and at which hit, such as `tr.commit kill9 3`, or `tr.commit/optim_step kill9 1` for one kind
of op only. Hits are counted by each process for itself, from when it first sees the order; the
first to get there renames it to `taken.{pid}` and obeys. Every hit is a line in the file `hits`.
"""

import asyncio
import os
import signal
import time
from pathlib import Path

POINTS = frozenset(
    {
        # gateway: request checked, payload to be put, to be admitted, admitted; a long poll: begun,
        # answer known
        *("gw.body", "gw.put", "gw.admit", "gw.reply", "gw.poll", "gw.deliver"),
        # trainer: taking a run over
        *("tr.acquire", "tr.restore", "tr.replay"),
        # trainer: the owner loop; mid is when the state has changed and the outcome is not known
        *("tr.read", "tr.begin", "tr.exec", "tr.mid", "tr.put_res", "tr.commit"),
        # trainer: a snapshot
        *("sn.copy", "sn.upload", "sn.manifest", "sn.cas", "sn.trim"),
        # trainer: a save; its commit is tr.commit
        *("sv.blobs", "sv.man", "sv.name", "sv.verify"),
        # sampler: job claimed, before a step, finished and not stored, stored and taken off
        *("sm.claim", "sm.gen", "sm.store", "sm.ack"),
        # registry: before a call that writes, and when it has and nobody knows
        *("rg.before", "rg.after"),
    }
)
ACTIONS = ("kill9", "stop", "delay", "raise")
DELAY_S = 0.5
SETTLE_S = 0.3


class Failed(Exception):
    """What the action `raise` raises."""


class _Orders:
    """The orders in one folder, as one process follows them."""

    def __init__(self, folder: Path) -> None:
        self._order = folder / "order"
        self._hits = os.open(folder / "hits", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._seen = ""
        self._num_hits = 0

    async def hit(self, point: str, kind: str) -> None:
        assert point in POINTS, point
        of_kind = f"{point}/{kind}" if kind else point
        os.write(self._hits, f"{of_kind}\n".encode())
        try:
            order = self._order.read_text()
        except FileNotFoundError:
            order = ""
        if order != self._seen:
            self._seen, self._num_hits = order, 0
        wanted, action, at = (order or "- - 0").split()
        is_meant = wanted in (point, of_kind)
        self._num_hits += is_meant
        if is_meant and self._num_hits >= int(at) and self._take():
            await _carry_out(action, point)

    def _take(self) -> bool:
        """Whether the order was there to take: of several processes only one carries it out."""
        try:
            self._order.rename(self._order.with_name(f"taken.{os.getpid()}"))
        except FileNotFoundError:
            return False
        return True


_orders: _Orders | None = None


def turn_on(folder: Path) -> None:
    """From now on this process follows the orders in `folder`."""
    global _orders
    _orders = _Orders(folder)


async def failpoint(point: str, kind: str = "") -> None:
    """Nothing, unless a test has ordered something at this point, for this kind or any."""
    if _orders is not None:
        await _orders.hit(point, kind)


def _freeze() -> None:
    # Nothing new begins meanwhile, and threads end what they are writing: frozen within a write
    # they would keep the disk store's lock, and with it hold up who takes over.
    time.sleep(SETTLE_S)
    os.kill(os.getpid(), signal.SIGSTOP)


async def _carry_out(action: str, point: str) -> None:
    match action:
        case "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            _freeze()
        case "delay":
            await asyncio.sleep(DELAY_S)
        case "raise":
            raise Failed(point)
        case _:
            raise ValueError(f"action {action!r} is not one of {ACTIONS}")
