"""(c) Peak memory of training beside the plain loop's, each in a process of its own."""

import json
import resource
import subprocess
import sys
from pathlib import Path

NUM_SEQUENCES, LENGTH, RANK = 8, 512, 16
WAYS = ("engine", "plain")


def measure(folder: str, threads: int) -> dict[str, float]:
    """MiB above the loaded model; the ceiling is what the plain loop's logits alone take."""
    from trainer.setting import VOCAB_SIZE

    peaks = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, "-m", "trainer.memory", way, folder, str(threads)],
            cwd=Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks[way] = json.loads(done.stdout.splitlines()[-1])
    return {
        "(c) one [tokens, vocabulary] of float32, MiB": (
            4 * NUM_SEQUENCES * LENGTH * VOCAB_SIZE / 2**20
        ),
        **{
            f"(c) {way}: {what}, MiB": value
            for way, figures in peaks.items()
            for what, value in figures.items()
        },
        "(c) ratio of what training adds (aim below 1)": (
            peaks["engine"]["training adds"] / peaks["plain"]["training adds"]
        ),
    }


def measure_here(way: str, folder: str, threads: int) -> dict[str, float]:
    """Two steps of one way in this process."""
    import torch

    from luthier_model.base import load_base_model
    from luthier_model.lora import LoraSpec
    from luthier_trainer.engine import Engine
    from luthier_trainer.optim import AdamParams
    from trainer.setting import PlainLoop, random_batch, request_of

    torch.set_num_threads(threads)
    base, spec = load_base_model("bench", folder), LoraSpec(rank=RANK, seed=1)
    batch = random_batch([LENGTH] * NUM_SEQUENCES, 0)
    if way == "engine":
        engine = Engine(base, logprob_chunk_tokens=1024, num_threads=threads)
        engine.create("run", spec)
        loaded = peak_mib()
        for _ in range(2):
            engine.forward_backward("run", request_of(batch), backward=True, clock_cycle=0)
            engine.optim_step("run", AdamParams(learning_rate=1e-4))
    else:
        loop = PlainLoop(folder, base, spec)
        del base
        loaded = peak_mib()
        for _ in range(2):
            loop.step(batch)
    return {"training adds": peak_mib() - loaded, "peak": peak_mib()}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
