"""(b) Eight runs of different ranks and small batches in shared passes, in the engine alone."""

from collections.abc import Sequence

from luthier_model.base import load_base_model
from luthier_model.lora import LoraSpec
from luthier_model.peft_io import tensors_from
from luthier_trainer.engine import Engine
from luthier_trainer.engine_host import PassOp
from luthier_trainer.optim import AdamParams
from trainer.setting import Batch, best_time, num_tokens, random_batch, request_of

RANKS = (1, 2, 4, 8, 16, 16, 32, 64)
ONE_RANK = 16
"""Of the run with all the data; the mean of RANKS is 17.9."""
LENGTH, DATUMS_PER_RUN = 64, 2
LIMIT = 1e-4
"""max|Δw| / max|w| of a tensor, as stated in docs/training-engine.md."""
STEP = AdamParams(learning_rate=1e-4)


def measure(folder: str, repeats: int, threads: int) -> dict[str, float]:
    """Tokens/s of the three ways, the ratios, and the largest deviation of a run's weights."""
    engine = Engine(
        load_base_model("bench", folder), logprob_chunk_tokens=1024, num_threads=threads
    )
    batches = [random_batch([LENGTH] * DATUMS_PER_RUN, seed) for seed in range(len(RANKS))]
    for index, rank in enumerate(RANKS):
        for prefix in ("fused", "alone"):
            engine.create(f"{prefix} {index}", LoraSpec(rank=rank, seed=index))
    engine.create("one", LoraSpec(rank=ONE_RANK, seed=1))
    together = [tokens for batch in batches for tokens in batch]
    ways = {
        "8 runs in shared passes": lambda: fused(engine, batches),
        "one run with all the data": lambda: step(engine, "one", together),
        "8 runs one after another": lambda: [
            step(engine, f"alone {index}", batch) for index, batch in enumerate(batches)
        ],
    }
    best = {name: float("inf") for name in ways}
    for _ in range(repeats + 1):  # in turns; all of them make the same number of steps
        for name, way in ways.items():
            best[name] = min(best[name], best_time(way, 1))
    rates = {name: num_tokens(together) / seconds for name, seconds in best.items()}
    worst = max(deviation(engine, index) for index in range(len(RANKS)))
    assert worst <= LIMIT, worst
    ours, one, alone = rates.values()
    return {
        **{f"(b) {name}, tokens/s": rate for name, rate in rates.items()},
        "(b) ratio to one run with all the data (aim 0.9)": ours / one,
        "(b) gain over one after another": ours / alone,
        f"(b) worst max|dw|/max|w| after {repeats + 1} steps, 1e-6 (limit {LIMIT * 1e6:g})": (
            worst * 1e6
        ),
    }


def fused(engine: Engine, batches: Sequence[Batch]) -> None:
    ops = [PassOp(f"fused {index}", request_of(batch)) for index, batch in enumerate(batches)]
    for _, output in engine.forward_backward_many(ops):
        assert isinstance(output, bytes)
    for _, metrics in engine.optim_step_many([(op.run_id, STEP) for op in ops]):
        assert isinstance(metrics, dict)


def step(engine: Engine, run_id: str, batch: Batch) -> None:
    engine.forward_backward(run_id, request_of(batch), backward=True, clock_cycle=0)
    engine.optim_step(run_id, STEP)


def deviation(engine: Engine, index: int) -> float:
    """Of a run's weights in shared passes from those alone."""
    ours, alone = (
        tensors_from(engine.save(f"{prefix} {index}", optimizer=False), "adapter_model.safetensors")
        for prefix in ("fused", "alone")
    )
    return max(
        ((ours[name] - w).abs().max() / w.abs().max().clamp_min(1e-9)).item()
        for name, w in alone.items()
    )
