"""Downloads one model: python -m luthier.up.download HF_ID FOLDER [REVISION]

A program of its own, so that Ctrl-C ends a download at once and `luthier up` stays small.
"""

import sys
from pathlib import Path

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""What a model and its tokenizer need. No Python files and no pickles (reliability S6, S8)."""


def download(repo_id: str, folder: Path, revision: str | None = None) -> None:
    """Puts the model's files into `folder`, which appears complete or not at all.

    One that is there is left as it is.
    """
    if folder.is_dir():
        return
    from huggingface_hub import snapshot_download

    unfinished = folder.with_name(f".{folder.name}.part")  # kept: the next try goes on from it
    snapshot_download(repo_id, revision=revision, local_dir=unfinished, allow_patterns=FILES)
    unfinished.rename(folder)


def main() -> int:
    """Exit 0 and print the folder, or 1 and one line on standard error."""
    repo_id, folder, *revision = sys.argv[1:]
    try:
        download(repo_id, Path(folder), *revision)
    except Exception as error:  # of three libraries; whatever it is, the person needs one line
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
