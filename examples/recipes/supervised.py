"""Supervised fine-tuning on chats: a dry run, batches by tokens, metrics to a file, a checkpoint.

    python examples/recipes/supervised.py [--model NAME] [--epochs 8] [--price 0.4]

Only the assistant's turns are learnt. `luthier run watch metrics.jsonl` draws the loss meanwhile.
"""

import argparse

import luthier
from luthier import data, types

ANSWERS = {"hello": "Hi there.", "thanks": "You are welcome.", "bye": "See you soon."}
CHATS = [
    [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    for said, answer in ANSWERS.items()
]
BATCH_TOKENS = 64


def main() -> None:
    args = parse_args()
    with luthier.ServiceClient() as service:
        training = service.create_lora_training_client(args.model, rank=16, seed=1)
        tokenizer = training.get_tokenizer()
        datums = [data.datum_from_messages(chat, tokenizer) for chat in CHATS]
        told = data.estimate(
            datums,
            batch_tokens=BATCH_TOKENS,
            num_epochs=args.epochs,
            price_per_million_tokens=args.price,
        )
        print(f"{told.total_tokens} tokens in {told.num_steps} steps, cost {told.cost:.6f}")
        if args.dry_run:
            return
        with luthier.MetricsLog(args.metrics, config=vars(args)) as log:
            step = 0
            for _ in range(args.epochs):
                for batch in data.batches(datums, max_tokens=BATCH_TOKENS):
                    gradient = training.forward_backward(batch, "cross_entropy")
                    update = training.optim_step(types.AdamParams(learning_rate=args.learning_rate))
                    metrics = update.result().metrics or {}
                    log.write({"loss": gradient.result().loss, **metrics}, step=step)
                    step += 1
            print(f"loss {gradient.result().loss:.4f} after {step} steps")
        print(training.save_weights_for_sampler("chats").result().path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="luthier/demo")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--price", type=float, default=0.0, help="per million trained tokens")
    parser.add_argument("--metrics", default="metrics.jsonl")
    parser.add_argument("--dry-run", action="store_true", help="say what it takes, and end")
    return parser.parse_args()


if __name__ == "__main__":
    main()
