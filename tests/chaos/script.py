"""What a user's program does, with the official SDK: every kind of op, several ahead, some large.

A script is a function of its seed. What it was told is a list of (label, result) in the order of
the program, without what may differ between two runs: their ids and the clock cycles.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import tinker
from tests.chaos.child import POISON
from tests.cluster.toy import LARGE_DATUM_TOKENS
from tinker import types
from tinker.lib import api_future_impl, internal_client_holder, session_futures_poller

MAX_AHEAD = 5
"""Requests that are sent before the results of those before are awaited."""
INVALID_TOKEN = 10**6
SLEEPS = 0.1
"""Of the pauses that the SDK makes between its tries."""


class Stuck(Exception):
    """A result has not come in time."""


class _Hurried(ModuleType):
    """asyncio, but with shorter sleeps."""

    def __getattr__(self, name: str) -> Any:
        import asyncio

        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float, result: Any = None) -> Any:
        import asyncio

        return await asyncio.sleep(seconds * SLEEPS, result)


def hurry() -> None:
    """Scale what the SDK waits between tries by SLEEPS, but for those of creations."""
    for module in (api_future_impl, internal_client_holder, session_futures_poller):
        module.asyncio = _Hurried("asyncio")  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One user's program."""

    seed: int
    base_model: str
    num_ops: int = 14
    large: bool = True
    """Some requests and results are too large for Redis."""
    poison: bool = False
    """One of its requests is the death of every engine that executes it."""
    stuck_s: float = 180.0
    """After a 503 the SDK pauses for 20 s, as it is told; a few in a row are bad luck."""


@dataclass(slots=True)
class Transcript:
    """What one play of a script was told."""

    results: list[tuple[str, Any]] = field(default_factory=list)
    run_ids: list[str] = field(default_factory=list)
    ended_early: str = ""
    """The exception that ended the program."""


class Player:
    """One program under way."""

    def __init__(self, script: Script, service: tinker.ServiceClient, told: Transcript) -> None:
        self._script = script
        self._service = service
        self._told = told
        self._rng = random.Random(script.seed)
        self._ahead: list[tuple[str, Any, Callable[[Any], Any]]] = []
        self._saved: list[str] = []
        self._num_names = 0

    def play(self) -> None:
        run = self._create(
            "create",
            self._service.create_lora_training_client(self._script.base_model, rank=4, seed=1),
        )
        # The ops right after a take-over are begun one by one: each kind is among them at times.
        early = [self._gradient, self._step, self._save, self._load, self._forward, self._publish]
        self._rng.shuffle(early)
        later = [*early, self._sample, self._export, self._refused, self._gradient, self._step]
        for kind in [*early, *self._rng.choices(later, k=self._script.num_ops - len(early))]:
            kind(run)
            if len(self._ahead) > MAX_AHEAD:
                self._settle()
        for kind in (self._sample, self._export, self._refused):
            kind(run)
        self._gradient(run, large=True)
        self._step(run)
        if self._script.poison:
            self._later(
                "poison", run.forward([_datum([1, POISON])], "cross_entropy"), _gradient_result
            )
            self._gradient(run)
        self._end(run)
        resumed = self._create(
            "resume",
            self._service.create_training_client_from_state_with_optimizer(self._saved[-1]),
        )
        self._gradient(resumed)
        self._step(resumed)
        self._end(resumed)

    def _end(self, run: tinker.TrainingClient) -> None:
        self._save(run)
        self._settle()
        path = self._of(run.save_weights_for_sampler("last"), "last").path
        self._draw(self._service.create_sampling_client(model_path=path), "last")
        listed = self._service.create_rest_client().list_checkpoints(self._told.run_ids[-1])
        names = [item.checkpoint_id for item in self._of(listed).checkpoints]
        self._told.results.append(("checkpoints", sorted(names)))

    def _create(self, label: str, future: Any) -> tinker.TrainingClient:
        run: tinker.TrainingClient = self._of(future)
        self._told.run_ids.append(str(run.model_id))
        self._told.results.append((label, "created"))
        return run

    def _of(self, future: Any, label: str = "a call") -> Any:
        try:
            return future.result(timeout=self._script.stuck_s)
        except (Late, TimeoutError) as error:
            raise Stuck(f"in {label} after {len(self._told.results)} results") from error

    # --- kinds of ops -----------------------------------------------------------------------------

    def _gradient(self, run: tinker.TrainingClient, *, large: bool = False) -> None:
        future = run.forward_backward(self._data(large=large), "cross_entropy")
        self._later("forward_backward", future, _gradient_result)

    def _forward(self, run: tinker.TrainingClient) -> None:
        data = self._data(large=True)
        self._later("forward", run.forward(data, "cross_entropy"), _gradient_result)

    def _refused(self, run: tinker.TrainingClient) -> None:
        """A forward, since what becomes of a gradient depends on when its error is delivered."""
        data = [_datum([1, INVALID_TOKEN])]
        self._later("refused", run.forward(data, "cross_entropy"), _gradient_result)

    def _step(self, run: tinker.TrainingClient) -> None:
        params = types.AdamParams(learning_rate=self._rng.randint(1, 9) * 1e-4)
        self._later("optim_step", run.optim_step(params), _step_result)

    def _save(self, run: tinker.TrainingClient) -> None:
        name = self._name("state")
        self._saved.append(f"tinker://{run.model_id}/weights/{name}")
        self._later("save_state", run.save_state(name), self._path)

    def _load(self, run: tinker.TrainingClient) -> None:
        """What was saved last, or first of all something to load."""
        if not self._saved:
            self._save(run)
            self._settle()  # a path is only checked, and found, once it is there
        path = self._saved[-1]
        if self._rng.random() < 0.5:
            self._settle()
            self._later("load", run.load_state_with_optimizer(path), self._path)
        else:
            self._settle()
            self._later("load", run.load_state(path), self._path)

    def _publish(self, run: tinker.TrainingClient) -> None:
        future = run.save_weights_for_sampler(self._name("sampler"))
        self._later("save_weights_for_sampler", future, self._path)
        # The SDK draws this one's seq on its own thread: what the program sends next may precede.
        self._settle()

    def _export(self, run: tinker.TrainingClient) -> None:
        future = run.save_weights_external(self._name("external"))
        self._later("save_weights_external", future, self._path)

    def _sample(self, run: tinker.TrainingClient) -> None:
        self._settle()
        self._draw(self._of(run.save_weights_and_get_sampling_client()), "sample")

    def _draw(self, sampling: Any, label: str) -> None:
        sampling = self._of(sampling) if hasattr(sampling, "result") else sampling
        futures = [
            sampling.sample(
                prompt=types.ModelInput.from_ints(self._tokens(6)),
                num_samples=2,
                sampling_params=types.SamplingParams(max_tokens=4, seed=seed, temperature=1.0),
            )
            for seed in (1, 2)
        ]
        for future in futures:
            self._ahead.append((label, future, _sample_result))
        self._settle()

    # --- plumbing ---------------------------------------------------------------------------------

    def _later(self, label: str, future: Any, read: Callable[[Any], Any]) -> None:
        self._ahead.append((label, future, read))

    def _settle(self) -> None:
        """Await everything that is on its way, in order."""
        while self._ahead:
            label, future, read = self._ahead.pop(0)
            try:
                result = read(self._of(future, label))
            except tinker.RequestFailedError as error:
                result = ("failed", str(error.category), self._plain(_sentence(error)))
            self._told.results.append((label, result))

    def _path(self, saved: Any) -> str:
        return self._plain(str(getattr(saved, "path", saved)))

    def _plain(self, text: str) -> str:
        for index, run_id in enumerate(self._told.run_ids):
            text = text.replace(run_id, f"run {index}")
        return text

    def _name(self, kind: str) -> str:
        self._num_names += 1
        return f"{kind}-{self._num_names}"

    def _data(self, *, large: bool) -> list[types.Datum]:
        large = large and self._script.large
        return [_datum(self._tokens(LARGE_DATUM_TOKENS if large else 5)) for _ in range(2)]

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(1, POISON) for _ in range(count)]


def _sentence(error: tinker.RequestFailedError) -> str:
    return str(error).partition(" for request")[0]


def _datum(tokens: list[int]) -> types.Datum:
    inputs = {"target_tokens": tokens, "weights": [1.0] * len(tokens)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def _gradient_result(output: types.ForwardBackwardOutput) -> Any:
    arrays = [
        {name: array.tolist() for name, array in item.items()} for item in output.loss_fn_outputs
    ]
    return output.loss_fn_output_type, arrays, _without_cycles(output.metrics)


def _step_result(output: types.OptimStepResponse) -> Any:
    return _without_cycles(output.metrics or {})


def _sample_result(output: types.SampleResponse) -> Any:
    return [(item.tokens, item.logprobs, item.stop_reason) for item in output.sequences]


def _without_cycles(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in sorted(metrics.items()) if "cycle" not in name}


def play(script: Script, url: str, api_key: str, told: Transcript) -> None:
    """Play a script to its end, or to the first exception of the SDK's; blocks."""
    with _service(url, api_key) as service:
        try:
            Player(script, service, told).play()
        except Exception as error:  # whatever the SDK raises is what the user gets
            told.ended_early = f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _service(url: str, api_key: str) -> Iterator[tinker.ServiceClient]:
    service = tinker.ServiceClient(base_url=url, api_key=api_key)
    try:
        yield service
    finally:
        # Or its heartbeats go on, ten times as often as the SDK's, through all later programs.
        with contextlib.suppress(Exception):
            service.close("success").result(timeout=10)
