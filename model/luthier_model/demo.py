"""The tiny demo model: built once per folder, deterministically; nothing is downloaded.

    python -m luthier_model.demo FOLDER          # or --cache DIR; prints the folder

The model is a Qwen3 of 0.9 million parameters, trained for a fixed number of steps on the text of
demo_text.py: enough to answer, to stop, and to learn a small task through LoRA within a minute.
Two builds in one environment are equal bit for bit; another version of torch may differ.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

DEMO_MODEL_VERSION = 1
"""Part of the cached folder's name: raise it with every change that changes the weights."""

Progress = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps in all, loss per token in nats)."""


def ensure_demo_model(cache_dir: Path, *, progress: Progress | None = None) -> Path:
    """The demo model's folder under `cache_dir`, built now if it is not there."""
    folder = cache_dir / f"luthier-demo-{DEMO_MODEL_VERSION}"
    if not folder.exists():
        try:
            _build(folder, progress)
        except OSError:
            # Another process may have finished the same model first, and it is as good as ours.
            if not folder.exists():
                raise
    return folder


def _build(folder: Path, progress: Progress | None) -> None:
    # Imported late: it takes seconds to load torch, and mostly the model is there.
    from luthier_model.demo_build import build_demo_model

    build_demo_model(folder, progress=progress)


def main(argv: Sequence[str]) -> int:
    """Builds the model if it is not there; its folder is the one line on stdout."""
    parser = argparse.ArgumentParser(prog="python -m luthier_model.demo", description=__doc__)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("folder", nargs="?", type=Path, help="the model's folder")
    place.add_argument("--cache", metavar="DIR", type=Path, help="folder of versioned demo models")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)
    progress = None if args.quiet else _print_progress
    try:
        if args.cache is not None:
            folder = ensure_demo_model(args.cache, progress=progress)
        else:
            folder = args.folder
            if not folder.exists():
                _build(folder, progress)
    except OSError as error:
        print(f"the demo model cannot be built: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


def _print_progress(step: int, num_steps: int, loss: float) -> None:
    """One line that is written over on a terminal; every tenth of the way elsewhere."""
    line = f"demo model: step {step} of {num_steps}, loss {loss:.2f}"
    done = step == num_steps
    if sys.stderr.isatty():
        print(line, end="\n" if done else "\r", file=sys.stderr, flush=True)
    elif done or step % max(1, num_steps // 10) == 0:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
