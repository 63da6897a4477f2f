"""Best of n: draws n answers to each question and keeps the one with the highest reward.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/best_of_n.py --num-samples 16

The reward is the likeness of the answer to the one that is wanted. The n samples of a question are
one request: its prompt is computed once. Exits with 0 if the best are better than the average.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from difflib import SequenceMatcher
from typing import Any

import tinker
from common import run_on_base_model, tokenizer_of
from tinker import types

TASKS = {
    "Copy: silver lake": "silver lake",
    "Uppercase: honey": "HONEY",
    "Spell: forest": "f-o-r-e-s-t",
    "First letter: garden": "g",
}


def best_of_n(service: tinker.ServiceClient, args: Namespace) -> bool:
    sampling = service.create_sampling_client(base_model=args.base_model)
    tokenizer = tokenizer_of(sampling, args.tokenizer)
    params = types.SamplingParams(
        max_tokens=16, temperature=args.temperature, seed=args.seed, stop=["\n"]
    )
    # All are sent before the first is waited for, so that they share the sampler's steps.
    futures = [
        sampling.sample(prompt_of(tokenizer, task), args.num_samples, params) for task in TASKS
    ]
    means, bests = [], []
    for (task, wanted), future in zip(TASKS.items(), futures, strict=True):
        texts = [text_of(tokenizer, sequence) for sequence in future.result().sequences]
        rewards = [reward(text, wanted) for text in texts]
        best = max(range(len(texts)), key=rewards.__getitem__)
        means.append(sum(rewards) / len(rewards))
        bests.append(rewards[best])
        print(f"{task!r}: best {texts[best]!r} ({rewards[best]:.2f}), mean {means[-1]:.2f}")
    mean, best_mean = sum(means) / len(means), sum(bests) / len(bests)
    print(f"reward: {mean:.3f} on average, {best_mean:.3f} with the best of {args.num_samples}")
    return best_mean > mean


def prompt_of(tokenizer: Any, task: str) -> types.ModelInput:
    return types.ModelInput.from_ints(tokenizer.encode(f"{task}\nAnswer:"))


def text_of(tokenizer: Any, sequence: types.SampledSequence) -> str:
    return str(tokenizer.decode(sequence.tokens, skip_special_tokens=True)).strip()


def reward(text: str, wanted: str) -> float:
    """From 0 to 1, the likeness of two texts."""
    return SequenceMatcher(None, text, wanted).ratio()


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder or Hub name; default: the base model's name")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    run_on_base_model(best_of_n, parser)
