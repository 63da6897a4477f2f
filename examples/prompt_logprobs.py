"""Scores a dataset: the logprob of every token of every text, without generating anything.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/prompt_logprobs.py                      # a few lines that it brings along
    python examples/prompt_logprobs.py texts.txt --json scores.jsonl

One text a line. Prints the perplexity of each text and of the whole.
"""

import json
import math
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import tinker
from common import first_model, run, tokenizer_of
from tinker import types

TEXTS = [
    "Question: What is two plus three?\nAnswer: five",
    "Question: What is two plus three?\nAnswer: zebra",
    "User: hello\nAssistant: Hello! How can I help you?",
    "qxj vvk zzw",
]


def prompt_logprobs(service: tinker.ServiceClient, args: Namespace) -> bool:
    texts = args.texts.read_text().splitlines() if args.texts else TEXTS
    scored = score(service, args, texts)
    for text, logprobs in zip(texts, scored, strict=True):
        print(f"perplexity {perplexity(logprobs):10.2f}  {text[:60]!r}")
    print(f"perplexity {perplexity([value for row in scored for value in row]):10.2f}  in all")
    if args.json:
        rows = [
            json.dumps({"text": text, "logprobs": logprobs})
            for text, logprobs in zip(texts, scored, strict=True)
        ]
        args.json.write_text("".join(f"{row}\n" for row in rows))
    return True


def score(service: tinker.ServiceClient, args: Namespace, texts: list[str]) -> list[list[float]]:
    """Logprobs in nats of each text's tokens after the first, which nothing predicts."""
    sampling = service.create_sampling_client(base_model=args.base_model or first_model())
    tokenizer = tokenizer_of(sampling, args.tokenizer)
    # All are sent before the first is waited for, so that they share the sampler's steps.
    futures = [
        sampling.compute_logprobs(types.ModelInput.from_ints(tokenizer.encode(text)))
        for text in texts
    ]
    return [[value for value in future.result() if value is not None] for future in futures]


def perplexity(logprobs: list[float]) -> float:
    """exp of the mean negative logprob; NaN of no tokens."""
    return math.exp(-sum(logprobs) / len(logprobs)) if logprobs else math.nan


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="?", type=Path, help="a file of one text a line")
    parser.add_argument("--base-model", help="default: the first that the server supports")
    parser.add_argument("--tokenizer", help="folder or Hub name; default: the base model's name")
    parser.add_argument("--json", type=Path, help="write texts and logprobs to this file")
    run(prompt_logprobs, parser)
