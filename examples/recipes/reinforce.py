"""Reinforcement learning: sample, reward, and follow the gradient of the expected reward.

    python examples/recipes/reinforce.py [--model NAME] [--steps 10]

The advantage of a sample is its reward less the mean of its group. Its tokens carry the log
probabilities they were drawn with, so that importance_sampling is right even if the weights have
moved since. The reward is the share of one letter, so it can only be had by changing the model.
"""

import argparse

import luthier
from luthier import types

PROMPTS = ["Tell me a word.", "Say something."]
LETTER = "e"


def main() -> None:
    args = parse_args()
    params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=args.seed)
    with luthier.ServiceClient() as service:
        training = service.create_lora_training_client(args.model, rank=16, seed=args.seed)
        tokenizer = training.get_tokenizer()
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        for step in range(args.steps):
            sampling = training.save_weights_and_get_sampling_client()
            futures = [
                sampling.sample(types.ModelInput.from_ints(tokens), args.group, params)
                for tokens in prompts
            ]
            datums, rewards = [], []
            for tokens, response in zip(prompts, luthier.progress(futures), strict=True):
                group = [reward(tokenizer.decode(one.tokens)) for one in response.sequences]
                mean = sum(group) / len(group)
                rewards.append(mean)
                datums += [
                    datum(tokens, one, value - mean)
                    for one, value in zip(response.sequences, group, strict=True)
                ]
            gradient = training.forward_backward(datums, "importance_sampling")
            training.optim_step(types.AdamParams(learning_rate=args.learning_rate)).result()
            gradient.result()
            print(f"step {step}: mean reward {sum(rewards) / len(rewards):.3f}")


def reward(text: str) -> float:
    """From 0 to 1, the share of the letter."""
    return text.count(LETTER) / max(len(text), 1)


def datum(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """Prompt and sample; positions that predict the prompt have no advantage."""
    tokens = prompt + sequence.tokens
    padding = [0.0] * (len(prompt) - 1)
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": padding + (sequence.logprobs or []),
            "advantages": padding + [advantage] * len(sequence.tokens),
        },
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="luthier/demo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--group", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
