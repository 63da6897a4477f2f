"""A process that dies at one of its calls to the object store or to Redis."""

from typing import Any, Self

BLOB_CALLS = frozenset(
    {
        *("put", "put_if_absent", "put_if_match", "put_stream"),
        *("get", "get_with_etag", "size", "delete"),
    }
)
REDIS_CALLS = frozenset({"hset", "hdel", "hgetall", "zrange", "zrem"})


class Died(Exception):
    pass


class Countdown:
    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def tick(self) -> None:
        if self.left == 0:
            raise Died
        self.left -= 1


class Dying:
    """Passes calls on until the given one; that one is lost before or after it was carried out."""

    def __init__(self, real: Any, clock: Countdown, names: frozenset[str]) -> None:
        self._real, self._clock, self._names = real, clock, names

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._real, name)
        if name not in self._names:
            return call

        async def passed_on(*args: Any, **more: Any) -> Any:
            self._clock.tick()
            result = await call(*args, **more)
            self._clock.tick()
            return result

        return passed_on


class DyingRedis(Dying):
    """The same for a client of Redis: a transaction is one step."""

    def __init__(self, real: Any, clock: Countdown) -> None:
        super().__init__(real, clock, REDIS_CALLS)

    def pipeline(self, *args: Any, **more: Any) -> "_DyingPipeline":
        return _DyingPipeline(self._real.pipeline(*args, **more), self._clock)


class _DyingPipeline(Dying):
    def __init__(self, real: Any, clock: Countdown) -> None:
        super().__init__(real, clock, frozenset({"execute"}))

    async def __aenter__(self) -> Self:
        await self._real.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self._real.__aexit__(*raised)
