"""Direct preference optimisation (Rafailov et al. 2023) through a loss of one's own.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/dpo.py

`forward_backward_custom` calls a function of this program with the logprobs of every datum: any
loss that torch can differentiate. Of each pair of answers the one in capitals is preferred. Exits
with 0 if the preferred answer has gained on the other in every pair.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

import tinker
import torch
from common import curve, run_on_base_model
from tinker import types
from torch.nn.functional import logsigmoid

WORDS = ("honey", "silver", "forest", "garden", "castle", "dragon")


def dpo(service: tinker.ServiceClient, args: Namespace) -> bool:
    training = service.create_lora_training_client(args.base_model, 8, args.seed).result()
    tokenizer = training.get_tokenizer()
    data = []  # preferred, other, preferred, other, ...
    for word in WORDS:
        data += [make_datum(word, answer, tokenizer) for answer in (word.upper(), word)]
    # A new LoRA changes nothing yet: these are the reference model's.
    outputs = training.forward(data, "cross_entropy").result().loss_fn_outputs
    reference = sums(data, [output["logprobs"].to_torch() for output in outputs])

    def loss(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        gains = sums(data, logprobs) - reference
        margins = args.beta * (gains[0::2] - gains[1::2])
        metrics = {"margin:mean": margins.mean().item(), "margin:min": margins.min().item()}
        return -logsigmoid(margins).sum(), metrics

    losses, margins = [], []
    smallest = 0.0
    for _ in range(args.steps):
        forward_backward = training.forward_backward_custom(data, loss)
        optim_step = training.optim_step(types.AdamParams(learning_rate=args.learning_rate))
        metrics = forward_backward.result().metrics
        optim_step.result()
        margins.append(metrics["margin:mean"])
        smallest = metrics["margin:min"]
        losses.append(-logsigmoid(torch.tensor(margins[-1])).item())
    curve("loss at the mean", losses)
    curve("margin", margins)
    return smallest > 0


def make_datum(word: str, answer: str, tokenizer: Any) -> types.Datum:
    prompt = tokenizer.encode(f"Copy: {word}\nAnswer:")
    completion = tokenizer.encode(f" {answer}\n")
    tokens = prompt + completion
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": weights}
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)


def sums(data: list[types.Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """The logprob of each datum's answer."""
    pairs = zip(data, logprobs, strict=True)
    return torch.stack(
        [(lp * datum.loss_fn_inputs["weights"].to_torch()).sum() for datum, lp in pairs]
    )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    run_on_base_model(dpo, parser)
