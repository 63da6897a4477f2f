"""Learning from preferences (DPO) with a loss of one's own. Needs torch.

    python examples/recipes/preferences.py [--model NAME] [--steps 10]

Direct Preference Optimization, Rafailov et al. 2023, equation 7: of each pair, the preferred answer
gains log probability against the model as it was, and the other one loses it.
"""

import argparse

import torch

import luthier
from luthier import data, types

PAIRS = [
    ("Q: two and two?\nA:", " four", " five"),
    ("Q: the sky?\nA:", " blue", " green"),
]
"""(prompt, preferred, rejected)"""
BETA = 0.1


def main() -> None:
    args = parse_args()
    with luthier.ServiceClient() as service:
        training = service.create_lora_training_client(args.model, rank=16, seed=1)
        encode = training.get_tokenizer().encode
        datums = [
            data.datum_from_completion(encode(prompt), encode(answer, add_special_tokens=False))
            for prompt, *answers in PAIRS
            for answer in answers
        ]
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in datums]
        before = training.forward(datums, "cross_entropy").result().loss_fn_outputs
        reference = [
            (one["logprobs"].to_torch() * weight).sum()
            for one, weight in zip(before, weights, strict=True)
        ]

        def dpo(
            data: list[types.Datum], logprobs: list[torch.Tensor]
        ) -> tuple[torch.Tensor, dict[str, float]]:
            gains = torch.stack(
                [
                    (scores * weight).sum() - old
                    for scores, weight, old in zip(logprobs, weights, reference, strict=True)
                ]
            ).reshape(-1, 2)
            margins = BETA * (gains[:, 0] - gains[:, 1])
            return -torch.nn.functional.logsigmoid(margins).mean(), {
                "margin": margins.mean().item()
            }

        for step in range(args.steps):
            result = training.forward_backward_custom(datums, dpo)
            training.optim_step(types.AdamParams(learning_rate=args.learning_rate)).result()
            metrics = result.result().metrics
            print(f"step {step}: loss {metrics['loss:sum']:.4f}, margin {metrics['margin']:.3f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="luthier/demo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
