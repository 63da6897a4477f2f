"""The engine of the toy trainers, and of the oracle: a hash in place of weights.

Any op that is missing, doubled or out of order changes every later result. It has the methods of
the trainer's engine, so the real executor drives it; tests.simulation.toy says what the state is.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tests.simulation.toy import State

from luthier_core.errors import NotFound
from luthier_core.ops import INLINE_LIMIT, Kind, digest_of
from luthier_core.proto import wire_pb2
from luthier_trainer.engine_host import STATE_FILE, PassOp

LARGE_DATUM_TOKENS = 1200
"""A forward_backward of this many tokens is too large for Redis, and so is its result."""


class ToyEngine:
    """States of runs by run id; NotFound for a run that is not here, as in the real one."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}

    def create(self, run_id: str, spec: Any) -> None:
        self._apply(run_id, Kind.CREATE_MODEL, f"{spec.rank} {spec.seed}".encode(), State())

    def forward_backward(
        self, run_id: str, request: bytes, *, backward: bool, clock_cycle: int
    ) -> bytes:
        kind = Kind.FORWARD_BACKWARD if backward else Kind.FORWARD
        content = _content(request)
        state = self._apply(run_id, kind, content, self._state(run_id))
        large = len(request) > INLINE_LIMIT
        output = wire_pb2.ForwardBackwardOutput(
            loss_fn_output_type=state.result(digest_of(content), large=large).decode(),
            metrics={"clock_cycle:unique": float(clock_cycle)},
        )
        encoded: bytes = output.SerializeToString()
        return encoded

    def forward_backward_many(
        self, ops: Sequence[PassOp]
    ) -> Iterator[tuple[int, bytes | Exception]]:
        for index, op in enumerate(ops):
            try:
                yield (
                    index,
                    self.forward_backward(
                        op.run_id, op.request, backward=op.backward, clock_cycle=op.clock_cycle
                    ),
                )
            except Exception as error:
                yield index, error

    def optim_step_many(
        self, steps: Sequence[tuple[str, Any]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        for index, (run_id, params) in enumerate(steps):
            yield index, self.optim_step(run_id, params)

    def optim_step(self, run_id: str, params: Any) -> dict[str, float]:
        step = str(params.learning_rate).encode()
        state = self._apply(run_id, Kind.OPTIM_STEP, step, self._state(run_id))
        return {"state": float(int(state.digest[:12], 16)), "step": float(state.num_steps)}

    def clear_gradient(self, run_id: str) -> None:
        self.states[run_id] = self._state(run_id).without_gradient()

    def load(self, run_id: str, files: Mapping[str, bytes], *, optimizer: bool) -> None:
        saved = State(**json.loads(files["state.json"])).without_gradient()
        self.states[run_id] = saved if optimizer else replace(saved, num_steps=0)

    def copy_files(self, run_id: str, *, optimizer: bool) -> Callable[[], dict[str, bytes]]:
        state = self._state(run_id)
        return lambda: {"state.json": json.dumps(asdict(state)).encode()}

    def logprob_gap(self, run_id: str) -> dict[str, float]:
        """Nobody samples from a toy."""
        return {"logprob_gap:alarm": 0.0}

    def copy_state(self, run_id: str) -> Callable[[], dict[str, bytes]]:
        state = self._state(run_id)
        return lambda: {STATE_FILE: json.dumps(asdict(state)).encode()}

    def take_state(self, run_id: str, spec: Any, data: bytes) -> None:
        self.states[run_id] = State(**json.loads(data))

    def checksum(self, run_id: str) -> str:
        return self._state(run_id).digest

    def drop(self, run_id: str) -> None:
        self.states.pop(run_id, None)

    def _state(self, run_id: str) -> State:
        if run_id not in self.states:
            raise NotFound(f"training run {run_id!r}")
        return self.states[run_id]

    def _apply(self, run_id: str, kind: Kind, op: bytes, before: State) -> State:
        self.states[run_id] = before.applied(kind, digest_of(op))
        return self.states[run_id]


def _content(request: bytes) -> bytes:
    """The same for the same program, whichever run it trains."""
    message = wire_pb2.ForwardBackwardRequest.FromString(request)
    message.model_id = ""
    encoded: bytes = message.SerializeToString(deterministic=True)
    return encoded
