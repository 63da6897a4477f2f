"""Evaluating one set of weights from several processes: a SamplingClient travels by pickle.

    python examples/recipes/evaluate.py [--path tinker://RUN/sampler_weights/NAME] [--workers 2]

Each process has a connection of its own and numbers its requests apart; the credentials come from
its environment.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import luthier
from luthier import types

QUESTIONS = {"Copy: river": "river", "Copy: stone": "stone", "Copy: cloud": "cloud"}


def main() -> None:
    args = parse_args()
    with luthier.ServiceClient() as service:
        if args.path:
            sampling = service.create_sampling_client(model_path=args.path)
        else:
            sampling = service.create_sampling_client(base_model=args.model)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            right = list(pool.map(partial(is_right, sampling), QUESTIONS.items()))
    print(f"{sum(right)} of {len(right)} right")


def is_right(sampling: luthier.SamplingClient, item: tuple[str, str]) -> bool:
    """Whether the greedy answer begins with the one that is wanted; runs in a worker."""
    question, wanted = item
    tokenizer = sampling.get_tokenizer()
    prompt = types.ModelInput.from_ints(tokenizer.encode(f"{question}\nAnswer:"))
    params = types.SamplingParams(max_tokens=8, temperature=0.0, stop=["\n"])
    tokens = sampling.sample(prompt, 1, params).result().sequences[0].tokens
    return str(tokenizer.decode(tokens)).strip().startswith(wanted)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="luthier/demo")
    parser.add_argument("--path", help="weights in place of the base model")
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
