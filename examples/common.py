"""What the examples share: the model and its tokenizer, a curve in the terminal, exit codes."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import tinker
from rich.console import Console
from transformers import AutoTokenizer

console = Console()

BLOCKS = "▁▂▃▄▅▆▇█"


Example = Callable[[tinker.ServiceClient, Namespace], bool]


def run_on_base_model(example: Example, parser: ArgumentParser) -> None:
    """As run, with the options --base-model and --seed."""
    parser.add_argument("--base-model", help="default: the first that the server supports")
    parser.add_argument("--seed", type=int, default=0)

    def on_base_model(service: tinker.ServiceClient, args: Namespace) -> bool:
        args.base_model = args.base_model or first_model()
        return example(service, args)

    run(on_base_model, parser)


def run(example: Example, parser: ArgumentParser) -> None:
    """Exits with 0 if the example returned True, with 1 if not, with 2 if the server cannot."""
    args = parser.parse_args()
    try:
        with tinker.ServiceClient() as service:
            sys.exit(0 if example(service, args) else 1)
    except tinker.TinkerError as error:
        console.print(f"The server could not do it: {error}", style="red", markup=False)
        sys.exit(2)


def first_model() -> str:
    models = tinker.RestClient().get_server_capabilities().result().supported_models
    return str(models[0].model_name)


def tokenizer_of(sampling: tinker.SamplingClient, place: str | None) -> Any:
    """From a folder or the Hugging Face Hub; by the model's name if no place is given."""
    if place is None:
        return sampling.get_tokenizer()
    return AutoTokenizer.from_pretrained(place)


def curve(name: str, values: Sequence[float]) -> None:
    """Prints one line: the values as blocks from the lowest to the highest, first and last."""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low or 1.0)
    blocks = "".join(BLOCKS[round((value - low) * scale)] for value in values)
    console.print(f"{name:>16} {values[0]:8.3f} {blocks} {values[-1]:.3f}", highlight=False)
