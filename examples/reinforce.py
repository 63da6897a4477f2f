"""Reinforcement learning with `importance_sampling`: answers that are rewarded become likelier.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/reinforce.py

The reward of an answer is its share of the letter "o". Each step samples a group of answers to a
few prompts from the weights as they are; an answer's advantage is what it has above its group's
mean. Exits with 0 if the mean reward has doubled.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

import tinker
from common import curve, run_on_base_model
from tinker import types

PROMPTS = ("Copy: silver lake\nAnswer:", "Spell: forest\nAnswer:", "The old", "Once a")
GROUP_SIZE = 16
MAX_TOKENS = 12


def reinforce(service: tinker.ServiceClient, args: Namespace) -> bool:
    training = service.create_lora_training_client(args.base_model, 8, args.seed).result()
    tokenizer = training.get_tokenizer()
    params = types.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0)
    mean_rewards, divergences = [], []
    for _ in range(args.steps):
        sampling = training.save_weights_and_get_sampling_client().result()
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        futures = [
            sampling.sample(types.ModelInput.from_ints(prompt), GROUP_SIZE, params)
            for prompt in prompts
        ]
        data, rewards = [], []
        for prompt, future in zip(prompts, futures, strict=True):
            sequences = future.result().sequences
            group = [reward(tokenizer.decode(sequence.tokens)) for sequence in sequences]
            mean = sum(group) / len(group)
            rewards += group
            data += [
                make_datum(prompt, sequence, its - mean)
                for sequence, its in zip(sequences, group, strict=True)
            ]
        forward_backward = training.forward_backward(data, "importance_sampling")
        optim_step = training.optim_step(types.AdamParams(learning_rate=args.learning_rate))
        divergences.append(forward_backward.result().metrics["kl_k3:mean"])
        optim_step.result()
        mean_rewards.append(sum(rewards) / len(rewards))
    curve("reward", mean_rewards)
    curve("KL to sampler", divergences)
    return mean_rewards[-1] > 2 * mean_rewards[0]


def reward(text: str) -> float:
    return text.count("o") / max(len(text), 1)


def make_datum(prompt: list[int], sampled: types.SampledSequence, advantage: float) -> types.Datum:
    """Prompt positions have logprob 0 and advantage 0, which marks them as not sampled."""
    tokens = prompt + list(sampled.tokens)
    assert sampled.logprobs is not None
    before = len(prompt) - 1
    inputs: dict[str, Any] = {
        "target_tokens": tokens[1:],
        "logprobs": [0.0] * before + list(sampled.logprobs),
        "advantages": [0.0] * before + [advantage] * len(sampled.tokens),
    }
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    run_on_base_model(reinforce, parser)
