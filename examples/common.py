"""What the examples of training share: the server's model, a curve in the terminal, exit codes."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

import tinker
from rich.console import Console

console = Console()

BLOCKS = "▁▂▃▄▅▆▇█"


def run(example: Callable[[tinker.ServiceClient, Namespace], bool], parser: ArgumentParser) -> None:
    """Exits with 0 if the example returned True, with 1 if not, with 2 if the server cannot."""
    parser.add_argument("--base-model", help="default: the first that the server supports")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        with tinker.ServiceClient() as service:
            args.base_model = args.base_model or first_model()
            sys.exit(0 if example(service, args) else 1)
    except tinker.TinkerError as error:
        console.print(f"The server could not do it: {error}", style="red", markup=False)
        sys.exit(2)


def first_model() -> str:
    models = tinker.RestClient().get_server_capabilities().result().supported_models
    return str(models[0].model_name)


def curve(name: str, values: Sequence[float]) -> None:
    """Prints one line: the values as blocks from the lowest to the highest, first and last."""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low or 1.0)
    blocks = "".join(BLOCKS[round((value - low) * scale)] for value in values)
    console.print(f"{name:>16} {values[0]:8.3f} {blocks} {values[-1]:.3f}", highlight=False)
