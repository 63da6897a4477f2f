"""Training and sampling through the official SDK, in the form that tests compare."""

from collections.abc import Sequence
from dataclasses import dataclass

import tinker
from tests.acceptance.stack import ANSWER_S, BASE_MODEL
from tinker import APIFuture, types
from transformers import PreTrainedTokenizerFast

PHRASES = (
    ("banana split", "anana-bay plit-say"),
    ("quantum physics", "uantum-qay ysics-phay"),
    ("donut shop", "onut-day op-shay"),
    ("pickle jar", "ickle-pay ar-jay"),
    ("space exploration", "ace-spay exploration-way"),
)
ADAM = types.AdamParams(learning_rate=2e-3, grad_clip_norm=1.0)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one training step answered, but for the clock cycles that it ran in."""

    loss: float
    logprobs: Sequence[Sequence[float]]
    optim_metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Step:
    """The futures of one training step."""

    forward_backward: APIFuture[types.ForwardBackwardOutput]
    optim_step: APIFuture[types.OptimStepResponse]

    def result(self) -> StepResult:
        output = self.forward_backward.result(timeout=ANSWER_S)
        metrics = self.optim_step.result(timeout=ANSWER_S).metrics or {}
        return StepResult(
            loss=output.metrics["loss:sum"],
            logprobs=[item["logprobs"].tolist() for item in output.loss_fn_outputs],
            optim_metrics={name: value for name, value in metrics.items() if "cycle" not in name},
        )


def create_run(
    service: tinker.ServiceClient, *, rank: int = 8, seed: int = 1
) -> tinker.TrainingClient:
    return service.create_lora_training_client(BASE_MODEL, rank=rank, seed=seed).result()


def submit_step(training: tinker.TrainingClient, data: list[types.Datum]) -> Step:
    """forward_backward and optim_step, sent and not waited for."""
    return Step(training.forward_backward(data, "cross_entropy"), training.optim_step(ADAM))


def train(
    training: tinker.TrainingClient, data: list[types.Datum], num_steps: int
) -> list[StepResult]:
    """Steps one after the other, as a training script waits for them."""
    return [submit_step(training, data).result() for _ in range(num_steps)]


def make_data(
    tokenizer: PreTrainedTokenizerFast, phrases: Sequence[tuple[str, str]] = PHRASES
) -> list[types.Datum]:
    """One datum per phrase, of different lengths; only the completion has weight."""
    data = []
    for english, latin in phrases:
        prompt = tokenizer.encode(_prompt(english))
        completion = tokenizer.encode(f" {latin}\n\n")
        tokens, weights = prompt + completion, [0] * len(prompt) + [1] * len(completion)
        inputs = {"target_tokens": tokens[1:], "weights": weights[1:]}
        model_input = types.ModelInput.from_ints(tokens[:-1])
        data.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))
    return data


def sample_greedily(
    sampling: tinker.SamplingClient, tokenizer: PreTrainedTokenizerFast
) -> list[list[int]]:
    """The tokens of one greedy answer per phrase; all are asked for at once."""
    params = types.SamplingParams(max_tokens=24, temperature=0.0)
    futures = [
        sampling.sample(
            prompt=types.ModelInput.from_ints(tokenizer.encode(_prompt(english))),
            num_samples=1,
            sampling_params=params,
        )
        for english, _ in PHRASES
    ]
    return [future.result(timeout=ANSWER_S).sequences[0].tokens for future in futures]


def _prompt(english: str) -> str:
    return f"English: {english}\nPig Latin:"
