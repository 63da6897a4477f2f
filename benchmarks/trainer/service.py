"""(a) One run through the whole service beside the plain loop, in turns."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tinker

from luthier_model.base import load_base_model
from luthier_model.lora import LoraSpec
from trainer.setting import (
    LEARNING_RATE,
    Batch,
    PlainLoop,
    flop_per_token,
    num_tokens,
    product_rate,
    ragged_lengths,
    random_batch,
)

MODEL = "bench"
RANK, SEED = 16, 1
NUM_SEQUENCES, LONGEST = 8, 256
AIMS = {"uniform": 0.95, "ragged 4:1": 1.3}


def measure(folder: str, repeats: int) -> dict[str, float]:
    """Tokens/s of both by kind of batch, the best step of some, and their ratios."""
    base = load_base_model(MODEL, folder)
    kinds = {
        "uniform": [LONGEST] * NUM_SEQUENCES,
        "ragged 4:1": ragged_lengths(NUM_SEQUENCES, LONGEST),
    }
    rate = product_rate(NUM_SEQUENCES * LONGEST)
    results = {"(a) products, GFLOP/s": rate}
    results["(a) ceiling of both: products alone, tokens/s"] = (
        rate * 1e9 / flop_per_token(base, RANK)
    )
    plain = PlainLoop(folder, base, LoraSpec(rank=RANK, seed=SEED))
    with service(folder) as client:
        training = client.create_lora_training_client(MODEL, rank=RANK, seed=SEED).result()
        for kind, lengths in kinds.items():
            ours, theirs = 1e9, 1e9
            for index in range(repeats + 1):
                batch = random_batch(lengths, index)
                our_s, our_loss = timed_step(training, batch)
                began = time.perf_counter()
                their_loss = plain.step(batch)
                their_s = time.perf_counter() - began
                assert abs(our_loss / their_loss - 1) < 1e-3, (our_loss, their_loss)
                if index:  # the first of a kind warms up
                    ours, theirs = min(ours, our_s), min(theirs, their_s)
            size = num_tokens(random_batch(lengths, 0))
            results[f"(a) {kind}: the service, tokens/s"] = size / ours
            results[f"(a) {kind}: transformers + PEFT, tokens/s"] = size / theirs
            results[f"(a) {kind}: ratio (aim {AIMS[kind]})"] = theirs / ours
    return results


def timed_step(training: tinker.TrainingClient, batch: Batch) -> tuple[float, float]:
    """Seconds of a forward_backward and an optim_step, and the summed loss."""
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
            loss_fn_inputs={
                "target_tokens": tokens[1:].tolist(),
                "weights": [1.0] * (len(tokens) - 1),
            },
        )
        for tokens in batch
    ]
    began = time.perf_counter()
    forward_backward = training.forward_backward(data, "cross_entropy")
    step = training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
    loss = forward_backward.result().metrics["loss:sum"]
    step.result()
    return time.perf_counter() - began, loss


@contextmanager
def service(folder: str) -> Iterator[tinker.ServiceClient]:
    """`luthier up` with the model, as it comes: its trainer computes on one thread."""
    with tempfile.TemporaryDirectory() as data:
        up = subprocess.Popen(
            [
                *(sys.executable, "-m", "luthier.cli", "up", "--data", data, "--port", "0"),
                *("--model", f"{MODEL}={folder}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        endpoint = Path(data) / "endpoint"
        try:
            while not endpoint.exists():
                if up.poll() is not None:
                    raise RuntimeError(f"luthier up has ended with {up.returncode}")
                time.sleep(0.1)
            key = (Path(data) / "api-key").read_text().strip()
            yield tinker.ServiceClient(base_url=endpoint.read_text().strip(), api_key=key)
        finally:
            up.terminate()
            up.wait()
