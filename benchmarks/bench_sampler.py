"""The sampler's engine beside transformers, on this machine and in this run.

(a) 64 concurrent requests of 32-token prompts and 64 new tokens: our engine, transformers' generate
    one by one, its best static batch, its own continuous batching.
(b) The same load with 8 adapters mixed.
(c) 16 samples of one 512-token prompt, beside one sample of it: the prompt is computed once.
(d) 512 requests like those of (a), queued at once with the official SDK through a `luthier up`:
    tokens/s beside the engine alone, time to the first token, memory before and after.
(e) One request at a time through the service: what it takes beyond the engine, at most 10 ms and
    2 fsync.

Greedy, float32, a random model of 63 M parameters that the benchmark makes. Every answer of the
engine is compared with transformers'. On a CPU the load is bound by matrix products: the ceiling is
their measured rate. On a GPU at this size, or alone, it is bound by reading the weights.

(d) and (e) use one thread for the engine on both sides, and the same model.

    python benchmarks/bench_sampler.py [--part engine|service] [--threads N] [--repeats N]
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from sampler_service import measure_service
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from luthier_core.config import SamplerConfig
from luthier_core.proto import wire_pb2
from luthier_model.base import BaseModel, load_base_model
from luthier_model.lora import LoraSpec, init_adapter
from luthier_model.packed_linear import pack_linears
from luthier_model.peft_io import adapter_files
from luthier_sampler.engine import Engine
from luthier_sampler.sequence import SampleRequest

NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 64
NUM_TOKENS = NUM_REQUESTS * NEW_TOKENS
NUM_ADAPTERS, RANK = 8, 16
NUM_SAMPLES, LONG_PROMPT = 16, 512
STATIC_BATCHES = (16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--part", choices=("engine", "service"), help="(a) to (c), or (d) and (e)")
    parser.add_argument("--layers", type=int, default=8, help="8 are 63 M parameters")
    parser.add_argument("--repeats", type=int, default=3, help="the best of them counts")
    options = parser.parse_args()
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, options.layers)
        if options.part != "service":
            torch.set_num_threads(options.threads)
            results |= measure(folder, options.repeats)
        if options.part != "engine":
            results |= measure_service(Path(folder), options.repeats)
    for name, value in results.items():
        print(f"{name:58} {value:12.2f}")
    facts = {
        "bench": "sampler",
        "cpu": cpu_name(),
        "threads": options.threads,
        "part": options.part or "all",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({**facts, **{name: round(value, 3) for name, value in results.items()}}))


def make_model(folder: str, num_layers: int) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    # Nothing here is text, but a sampler does not start without a tokenizer.
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measure(folder: str, repeats: int) -> dict[str, float]:
    prompts = np.random.default_rng(0).integers(0, 16384, (NUM_REQUESTS, PROMPT_TOKENS))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    model = load_base_model("bench", folder)
    results = ceilings(model)
    pack_linears(model)
    engine = Engine(model, None, engine_config())  # type: ignore[arg-type]  # no stop strings
    results["engine alone, tokens/s, best possible"] = ceiling(model, results)
    results |= load(engine, reference, prompts, repeats)
    results |= siblings(engine, prompts)
    return results


def engine_config() -> SamplerConfig:
    return SamplerConfig(max_running=NUM_REQUESTS, max_step_tokens=2048, num_kv_blocks=1024)


# --- ceilings -------------------------------------------------------------------------------------


def ceilings(model: BaseModel) -> dict[str, float]:
    """What the machine can do: GB/s of reading, GFLOP/s of 64 rows times a weight of the model."""
    floats = torch.ones(64 * 1024 * 1024)
    read_s = best_time(lambda: floats.sum(), 5)
    x, weight = torch.randn(NUM_REQUESTS, 768), torch.randn(2048, 768)
    flop = 2 * x.numel() * len(weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    times = {
        "torch": best_time(lambda: torch.nn.functional.linear(x, weight), 50),
        "oneDNN, packed": best_time(
            lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), 50
        ),
    }
    results = {
        "parameters, M": num_parameters(model) / 1e6,
        "reading, GB/s": 0.256 / read_s * 1.048576,
    }
    return results | {
        f"products of 64 rows, {k}, GFLOP/s": flop / t / 1e9 for k, t in times.items()
    }


def ceiling(model: BaseModel, machine: dict[str, float]) -> float:
    """Tokens/s of load (a) if products and reading the weights were all there is to do."""
    rate = max(value for name, value in machine.items() if "products" in name) * 1e9
    # The tied embedding counts once as a product; the lookup is free.
    flop_per_token = 2 * num_parameters(model)
    prefill_s = NUM_REQUESTS * PROMPT_TOKENS * flop_per_token / rate
    step_s = max(
        NUM_REQUESTS * flop_per_token / rate,
        4 * num_parameters(model) / (machine["reading, GB/s"] * 1e9),
    )
    return NUM_TOKENS / (prefill_s + (NEW_TOKENS - 1) * step_s)


def num_parameters(model: BaseModel) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


# --- loads ----------------------------------------------------------------------------------------


def load(engine: Engine, reference: Any, prompts: np.ndarray, repeats: int) -> dict[str, float]:
    """Loads (a) and (b): tokens/s of each way, and their ratios."""
    for i in range(NUM_ADAPTERS):
        engine.add_adapter(f"adapter {i}", random_adapter(engine.model, i))
    adapters = [f"adapter {i % NUM_ADAPTERS}" for i in range(NUM_REQUESTS)]
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "(a) engine, tokens/s": lambda: ours(engine, prompts),
        f"(b) engine, {NUM_ADAPTERS} adapters of rank {RANK} mixed, tokens/s": lambda: ours(
            engine, prompts, adapters
        ),
        "(a) transformers' continuous batching, tokens/s": lambda: continuous(reference, prompts),
        **{
            f"(a) transformers' static batch of {size}, tokens/s": lambda size=size: static(
                reference, prompts, size
            )
            for size in STATIC_BATCHES
        },
    }
    static(reference, prompts[:2], 1)
    started = time.perf_counter()
    expected = static(reference, prompts[:8], 1)
    rates = {"(a) transformers' generate one by one, tokens/s": 8 * NEW_TOKENS / since(started)}
    differing = 0
    for name, way in ways.items():
        way()  # the first time warms up
        best_s = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            tokens = way()
            best_s = min(best_s, since(started))
        rates[name] = NUM_TOKENS / best_s
        if "(a) engine" in name:
            differing = sum(a != b for a, b in zip(tokens, expected, strict=False))
    a, b = rates["(a) engine, tokens/s"], next(v for k, v in rates.items() if k.startswith("(b)"))
    best_static = max(value for name, value in rates.items() if "static" in name)
    best_continuous = next(value for name, value in rates.items() if "continuous" in name)
    return rates | {
        "(a) engine / generate one by one, at least 8": a / next(iter(rates.values())),
        "(a) engine / best static batch, at least 1": a / best_static,
        "(a) engine / continuous batching, at least 1": a / best_continuous,
        "(b) / (a), at least 0.8": b / a,
        "(a) of the first 8 answers, not those of generate": differing,
    }


def siblings(engine: Engine, prompts: np.ndarray) -> dict[str, float]:
    """Load (c): computed tokens and seconds of one sample and of 16, of prompts not seen before."""
    results = {}
    random = np.random.default_rng(1)
    for num_samples in (1, NUM_SAMPLES):
        spec = SampleRequest(
            request_id="siblings",
            prompt=random.integers(0, 16384, LONG_PROMPT),
            num_samples=num_samples,
            max_tokens=1,
            seed=1,
            ignore_eos=True,
        )
        computed = engine.stats.num_computed_tokens
        started = time.perf_counter()
        run(engine, [spec])
        samples = f"(c) {num_samples} sample(s) of a {LONG_PROMPT}-token prompt"
        results[f"{samples}, ms to the first token"] = 1e3 * since(started)
        results[f"{samples}, computed tokens"] = engine.stats.num_computed_tokens - computed
    return results


def ours(engine: Engine, prompts: np.ndarray, adapters: list[str] | None = None) -> list[list[int]]:
    specs = [
        SampleRequest(
            request_id=f"{i}",
            prompt=prompt,
            max_tokens=NEW_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            adapter=adapters[i] if adapters else "",
        )
        for i, prompt in enumerate(prompts)
    ]
    return run(engine, specs)


def run(engine: Engine, specs: Iterable[SampleRequest]) -> list[list[int]]:
    """Tokens of each request's first sample, in order."""
    order = []
    for spec in specs:
        engine.add(spec)
        order.append(spec.request_id)
    tokens = {}
    while engine.has_work:
        for finished in engine.step():
            assert finished.response is not None, finished.error
            response = wire_pb2.SampleResponse.FromString(finished.response)
            tokens[finished.request_id] = np.frombuffer(
                response.sequences[0].tokens, "<i4"
            ).tolist()
    return [tokens[request_id] for request_id in order]


def static(reference: Any, prompts: np.ndarray, size: int) -> list[list[int]]:
    tokens: list[list[int]] = []
    for start in range(0, len(prompts), size):
        batch = torch.from_numpy(prompts[start : start + size])
        out = reference.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
        tokens += out[:, PROMPT_TOKENS:].tolist()
    return tokens


def continuous(reference: Any, prompts: np.ndarray) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    found = reference.generate_batch(
        inputs=prompts.tolist(), generation_config=config, progress_bar=False
    )
    tokens = [output.generated_tokens for output in found.values()]
    assert sum(map(len, tokens)) == NUM_TOKENS, "it stopped before the last token"
    return tokens


def random_adapter(model: BaseModel, seed: int) -> dict[str, bytes]:
    adapter = init_adapter(LoraSpec(rank=RANK, seed=seed), model.lora_shapes, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for pair in adapter.pairs.values():
        pair.b.normal_(std=0.01, generator=generator)
    return adapter_files(adapter, "bench")


def best_time(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of `times` calls, after one to warm up."""
    call()
    best_s = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        call()
        best_s = min(best_s, since(started))
    return best_s


def since(started: float) -> float:
    return time.perf_counter() - started


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
