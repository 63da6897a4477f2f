"""(d) How long a save for sampling holds up the engine, and what it does to a step beside it."""

import threading
import time

from luthier_model.base import load_base_model
from luthier_model.lora import LoraSpec
from luthier_trainer.engine import Engine
from luthier_trainer.optim import AdamParams
from trainer.setting import best_time, random_batch, request_of

RANK, NUM_SEQUENCES, LENGTH = 16, 8, 256


def measure(folder: str, repeats: int, threads: int) -> dict[str, float]:
    """Milliseconds of a step, of the copy that the engine makes, of the encoding beside it."""
    engine = Engine(
        load_base_model("bench", folder), logprob_chunk_tokens=1024, num_threads=threads
    )
    engine.create("run", LoraSpec(rank=RANK, seed=1))
    request = request_of(random_batch([LENGTH] * NUM_SEQUENCES, 0))

    def step() -> None:
        engine.forward_backward("run", request, backward=True, clock_cycle=0)
        engine.optim_step("run", AdamParams(learning_rate=1e-4))

    def step_with_a_save() -> None:
        encode = engine.copy_files("run", optimizer=False)
        beside = threading.Thread(target=encode)
        beside.start()
        step()
        beside.join()

    step()
    step_s = best_time(step, repeats)
    with_save_s = best_time(step_with_a_save, repeats)
    copy_s = best_time(lambda: engine.copy_files("run", optimizer=False), 5 * repeats)
    encode = engine.copy_files("run", optimizer=False)
    began = time.perf_counter()
    files = encode()
    encode_s = time.perf_counter() - began
    return {
        "(d) adapter, MB": sum(map(len, files.values())) / 1e6,
        "(d) step, ms": step_s * 1e3,
        "(d) pause of the engine: the copy, ms": copy_s * 1e3,
        "(d) beside the engine: encoding, ms": encode_s * 1e3,
        "(d) step with a save, ms": with_save_s * 1e3,
        "(d) pause, % of the step (aim 2)": copy_s / step_s * 100,
    }
