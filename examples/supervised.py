"""Supervised fine-tuning: batches of a generated dataset, a learning rate that falls, a test set.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/supervised.py

The task is to say a made-up word twice. Exits with 0 if the loss on words it was not taught has
halved.
"""

import random
from argparse import ArgumentParser, Namespace
from typing import Any

import tinker
from common import curve, run_on_base_model
from tinker import types

SYLLABLES = ("ba", "co", "di", "fo", "ga", "hi", "lo", "mu", "ne", "po", "ri", "sa", "ta", "vu")
NUM_TEST_WORDS = 8
BATCH_SIZE = 8
TEST_EVERY = 5


def supervised(service: tinker.ServiceClient, args: Namespace) -> bool:
    training = service.create_lora_training_client(args.base_model, 8, args.seed).result()
    tokenizer = training.get_tokenizer()
    words = random_words(NUM_TEST_WORDS + BATCH_SIZE * args.steps, args.seed)
    data = [make_datum(word, tokenizer) for word in words]
    test = data[:NUM_TEST_WORDS]
    losses, test_losses = [], []
    for step in range(args.steps):
        start = NUM_TEST_WORDS + step * BATCH_SIZE
        batch = data[start : start + BATCH_SIZE]
        learning_rate = args.learning_rate * (1 - step / args.steps)
        # Sent together; the answers come when they come.
        forward_backward = training.forward_backward(batch, "cross_entropy")
        optim_step = training.optim_step(types.AdamParams(learning_rate=learning_rate))
        if step % TEST_EVERY == 0 or step == args.steps - 1:
            tested = training.forward(test, "cross_entropy").result()
            test_losses.append(per_token(tested))
        losses.append(per_token(forward_backward.result()))
        optim_step.result()
    curve("training loss", losses)
    curve("test loss", test_losses)
    return test_losses[-1] < test_losses[0] / 2


def random_words(num_words: int, seed: int) -> list[str]:
    """All different, of three or four syllables."""
    chosen = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < num_words:
        words["".join(chosen.choices(SYLLABLES, k=chosen.choice((3, 4))))] = None
    return list(words)


def make_datum(word: str, tokenizer: Any) -> types.Datum:
    """Only the answer's tokens have weight."""
    prompt = tokenizer.encode(f"Twice: {word}\nAnswer:")
    answer = tokenizer.encode(f" {word} {word}\n")
    tokens = prompt + answer
    weights = [0] * len(prompt) + [1] * len(answer)
    # The token at position t is the target of position t - 1.
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": weights[1:]}
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)


def per_token(output: types.ForwardBackwardOutput) -> float:
    """Nats per token that counts: losses are sums."""
    return output.metrics["loss:sum"] / output.metrics["weights:sum"]


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    run_on_base_model(supervised, parser)
