"""Teaches a model seven Pig Latin phrases through the official `tinker` SDK and shows that it did.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/pig_latin.py

Exits with 0 only if the loss fell below a fifth of where it began and at least six of the seven
answers are reproduced; with 1 if not; with 2 if the server could not be used.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tinker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinker import types

EXAMPLES = {
    "banana split": "anana-bay plit-say",
    "quantum physics": "uantum-qay ysics-phay",
    "donut shop": "onut-day op-shay",
    "pickle jar": "ickle-pay ar-jay",
    "space exploration": "ace-spay exploration-way",
    "rubber duck": "ubber-ray uck-day",
    "coding wizard": "oding-cay izard-way",
}
MIN_REPRODUCED = 6
MAX_LOSS_RATIO = 1 / 5

console = Console()


@dataclass(frozen=True)
class Result:
    """What a training run did; `losses` are nats per completion token, one per step."""

    base_model: str
    losses: list[float]
    samples_before: list[str]
    samples: list[str]
    training_s: float

    @property
    def num_reproduced(self) -> int:
        return sum(map(str.__eq__, self.samples, EXAMPLES.values()))

    @property
    def learned(self) -> bool:
        fell = self.losses[-1] < self.losses[0] * MAX_LOSS_RATIO
        return fell and self.num_reproduced >= MIN_REPRODUCED


def main() -> int:
    args = parse_args()
    # Said before anything is sent: the SDK goes on trying for minutes where no server answers.
    server = os.environ.get(
        "TINKER_BASE_URL", "the SDK's own address, as TINKER_BASE_URL is not set"
    )
    console.print(f"Connecting to {server}", markup=False)
    try:
        with tinker.ServiceClient() as service:
            result = teach(service, args)
    except tinker.TinkerError as error:
        console.print(f"The server could not do it: {error}", style="red", markup=False)
        return 2
    report(result)
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 0 if result.learned else 1


def teach(service: tinker.ServiceClient, args: argparse.Namespace) -> Result:
    """The whole quickstart: sample, train, sample again."""
    base_model = args.base_model or first_model()
    console.print(f"Training a rank-{args.rank} LoRA on {base_model}")
    training = service.create_lora_training_client(base_model, args.rank, args.seed).result()
    # From the training client: it knows where the tokenizer lies, whatever the model is called.
    tokenizer = training.get_tokenizer()

    # A new LoRA changes nothing yet, so these are the base model's own answers.
    samples_before = sample_all(training, tokenizer)
    started = time.perf_counter()
    losses = train(training, tokenizer, args.steps, args.learning_rate)
    training_s = time.perf_counter() - started
    samples = sample_all(training, tokenizer)
    return Result(base_model, losses, samples_before, samples, training_s)


def first_model() -> str:
    """The first model that the server supports."""
    capabilities = tinker.RestClient().get_server_capabilities().result()
    names = [model.model_name for model in capabilities.supported_models if model.model_name]
    if not names:
        raise tinker.TinkerError("it supports no model")
    return names[0]


def prompt_of(english: str) -> str:
    return f"English: {english}\nPig Latin:"


def make_datum(english: str, pig_latin: str, tokenizer: Any) -> types.Datum:
    """One example for next-token prediction: only the completion's tokens have weight."""
    prompt = tokenizer.encode(prompt_of(english), add_special_tokens=True)
    completion = tokenizer.encode(f" {pig_latin}\n\n", add_special_tokens=False)
    tokens = prompt + completion
    weights = [0] * len(prompt) + [1] * len(completion)
    # The token at position t is the target of position t - 1, hence the shift by one.
    loss_fn_inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": weights[1:]}
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs)


def train(
    training: tinker.TrainingClient, tokenizer: Any, num_steps: int, learning_rate: float
) -> list[float]:
    """Trains on all examples in every step; the loss per completion token of every step."""
    data = [make_datum(english, latin, tokenizer) for english, latin in EXAMPLES.items()]
    num_weighted_tokens = sum(sum(datum.loss_fn_inputs["weights"].tolist()) for datum in data)
    adam_params = types.AdamParams(learning_rate=learning_rate)
    losses: list[float] = []
    with progress_bar() as progress:
        bar = progress.add_task("training", total=num_steps, loss=float("nan"))
        for _ in range(num_steps):
            # Both are sent before either is waited for, so that they share one cycle of the server.
            forward_backward = training.forward_backward(data, "cross_entropy")
            optim_step = training.optim_step(adam_params)
            losses.append(forward_backward.result().metrics["loss:sum"] / num_weighted_tokens)
            optim_step.result()
            progress.update(bar, advance=1, loss=losses[-1])
            if not console.is_terminal and len(losses) % 10 == 0:  # a log has no moving bar
                console.print(f"step {len(losses)} of {num_steps}: loss {losses[-1]:.4f}")
    return losses


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        console=console,
    )


def sample_all(training: tinker.TrainingClient, tokenizer: Any) -> list[str]:
    """One greedy answer to every example with the weights as they are now."""
    sampling = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=24, temperature=0.0, stop=["\n"])
    futures = [
        sampling.sample(
            prompt=types.ModelInput.from_ints(tokenizer.encode(prompt_of(english))),
            num_samples=1,
            sampling_params=params,
        )
        for english in EXAMPLES
    ]
    return [
        tokenizer.decode(future.result().sequences[0].tokens, skip_special_tokens=True).strip()
        for future in futures
    ]


def report(result: Result) -> None:
    """Prints the answers before and after side by side, and one line of figures."""
    table = Table("English", "expected", "before", "after", "")
    rows = zip(EXAMPLES.items(), result.samples_before, result.samples, strict=True)
    for (english, expected), before, after in rows:
        mark = "[green]✓[/]" if after == expected else "[red]✗[/]"
        # Control characters and brackets of an untrained model must not reach the terminal as such.
        table.add_row(english, expected, printable(before), printable(after), mark)
    console.print(table)
    rate = len(result.losses) / result.training_s
    console.print(
        f"loss {result.losses[0]:.3f} → {result.losses[-1]:.4f}, {len(result.losses)} steps in "
        f"{result.training_s:.1f} s ({rate:.1f} steps/s), "
        f"{result.num_reproduced} of {len(EXAMPLES)} reproduced",
        style="green" if result.learned else "red",
        highlight=False,
    )


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "·" for c in text).replace("[", r"\[")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", help="default: the first that the server supports")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--json", type=Path, help="write losses and samples to this file")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
