"""Work that outlasts the call that asked for it is done once, and found by the next call."""

import asyncio

import pytest

from luthier_core.errors import LuthierError, TooManyRequests, Unavailable
from luthier_registry.builds import MAX_AT_ONCE, Builds


async def test_calls_for_the_same_thing_share_the_work() -> None:
    num_begun = 0

    async def work() -> None:
        nonlocal num_begun
        num_begun += 1
        await asyncio.sleep(0)

    async with Builds() as builds:
        await asyncio.gather(*(builds.finish("a", work) for _ in range(3)))
        assert num_begun == 1
        await builds.finish("a", work)
        assert num_begun == 2


async def test_a_call_that_waits_too_long_is_told_to_come_back_and_the_work_goes_on() -> None:
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()

    async with Builds(wait_s=0) as builds:
        with pytest.raises(Unavailable, match="being made"):
            await builds.finish("a", work)
        may_end.set()
        while True:
            try:
                await builds.finish("a", work)
                break
            except Unavailable:
                await asyncio.sleep(0)


async def test_a_call_that_is_given_up_does_not_end_the_work() -> None:
    may_end, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await may_end.wait()
        ended.set()

    async with Builds() as builds:
        call = asyncio.ensure_future(builds.finish("a", work))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        may_end.set()
        await asyncio.wait_for(ended.wait(), 10)


async def test_what_the_work_raises_is_raised_and_the_next_call_tries_again() -> None:
    async def fail() -> None:
        raise LuthierError("the source is gone")

    async def succeed() -> None: ...

    async with Builds() as builds:
        with pytest.raises(LuthierError, match="the source is gone"):
            await builds.finish("a", fail)
        await builds.finish("a", succeed)


async def test_only_so_much_is_made_at_once_and_the_end_stops_it() -> None:
    stopped = 0

    async def work() -> None:
        nonlocal stopped
        try:
            await asyncio.Event().wait()
        finally:
            stopped += 1

    async with Builds(wait_s=0.001) as builds:
        for index in range(MAX_AT_ONCE):
            with pytest.raises(Unavailable):
                await builds.finish(str(index), work)
        with pytest.raises(TooManyRequests):
            await builds.finish("one more", work)
    assert stopped == MAX_AT_ONCE
