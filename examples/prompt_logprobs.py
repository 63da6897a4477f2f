"""Scores a dataset: the logprob of every token of every text, without generating anything.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/prompt_logprobs.py                      # a few lines that it brings along
    python examples/prompt_logprobs.py texts.txt --json scores.jsonl

One text a line. Prints the perplexity of each text and of the whole.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import tinker
from tinker import types
from transformers import AutoTokenizer

TEXTS = [
    "Question: What is two plus three?\nAnswer: five",
    "Question: What is two plus three?\nAnswer: zebra",
    "User: hello\nAssistant: Hello! How can I help you?",
    "qxj vvk zzw",
]


def main() -> int:
    args = parse_args()
    texts = args.texts.read_text().splitlines() if args.texts else TEXTS
    try:
        with tinker.ServiceClient() as service:
            scored = score(service, args, texts)
    except tinker.TinkerError as error:
        print(f"The server could not do it: {error}", file=sys.stderr)
        return 2
    for text, logprobs in zip(texts, scored, strict=True):
        print(f"perplexity {perplexity(logprobs):10.2f}  {text[:60]!r}")
    print(f"perplexity {perplexity([value for row in scored for value in row]):10.2f}  in all")
    if args.json:
        rows = [
            json.dumps({"text": text, "logprobs": logprobs})
            for text, logprobs in zip(texts, scored, strict=True)
        ]
        args.json.write_text("".join(f"{row}\n" for row in rows))
    return 0


def score(
    service: tinker.ServiceClient, args: argparse.Namespace, texts: list[str]
) -> list[list[float]]:
    """Logprobs in nats of each text's tokens after the first, which nothing predicts."""
    sampling = service.create_sampling_client(base_model=args.base_model or first_model())
    tokenizer = tokenizer_of(sampling, args.tokenizer)
    # All are sent before the first is waited for, so that they share the sampler's steps.
    futures = [
        sampling.compute_logprobs(types.ModelInput.from_ints(tokenizer.encode(text)))
        for text in texts
    ]
    return [[value for value in future.result() if value is not None] for future in futures]


def first_model() -> str:
    models = tinker.RestClient().get_server_capabilities().result().supported_models
    return str(models[0].model_name)


def tokenizer_of(sampling: tinker.SamplingClient, place: str | None) -> Any:
    """From a folder or the Hugging Face Hub; by the model's name if no place is given."""
    if place is None:
        return sampling.get_tokenizer()
    return AutoTokenizer.from_pretrained(place)


def perplexity(logprobs: list[float]) -> float:
    """exp of the mean negative logprob; NaN of no tokens."""
    return math.exp(-sum(logprobs) / len(logprobs)) if logprobs else math.nan


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="?", type=Path, help="a file of one text a line")
    parser.add_argument("--base-model", help="default: the first that the server supports")
    parser.add_argument("--tokenizer", help="folder or Hub name; default: the base model's name")
    parser.add_argument("--json", type=Path, help="write texts and logprobs to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
