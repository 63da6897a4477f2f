"""The training engine beside transformers + PEFT, on this machine and in this run.

(a) one run through the whole service, on one thread, against the same batches in a plain loop on
    one thread: 8 sequences of 256 tokens, and 8 of 64 to 256. Losses are compared.
(b) 8 runs of ranks 1 to 64, 2 sequences of 64 tokens each, in shared passes (`fused`), against one
    run of rank 16 with all the data, and against the 8 one after another. Weights are compared.
(c) peak memory of a step of 8 x 512 tokens beside the plain loop's.
(d) how long a save for sampling holds up the engine.

float32, a random Qwen3 of 63 M parameters that the benchmark makes, LoRA on every linear module.
Compute-bound: the ceiling printed in (a) is the measured rate of matrix products.

    python benchmarks/bench_trainer.py [--part a|b|c|d] [--threads N] [--layers N] [--repeats N]
"""

import argparse
import json
import os
import tempfile

import torch
import transformers
from trainer import fused, memory, pause, service
from trainer.setting import make_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices="abcd", action="append", help="all unless named")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of (b), (c), (d)")
    parser.add_argument("--layers", type=int, default=8, help="8 are 63 M parameters")
    parser.add_argument("--repeats", type=int, default=3, help="the best of them counts")
    options = parser.parse_args()
    parts, threads, repeats = options.part or list("abcd"), options.threads, options.repeats
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, options.layers)
        if "c" in parts:
            results |= memory.measure(folder, threads)
        if "a" in parts:
            torch.set_num_threads(1)
            results |= service.measure(folder, repeats)
        if "b" in parts:
            results |= fused.measure(folder, repeats, threads)
        if "d" in parts:
            results |= pause.measure(folder, repeats, threads)
    for name, value in sorted(results.items(), key=lambda item: item[0][:3]):
        print(f"{name:62} {value:10.2f}")
    facts = {
        "bench": "trainer",
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({**facts, **{name: round(value, 3) for name, value in results.items()}}))


if __name__ == "__main__":
    main()
