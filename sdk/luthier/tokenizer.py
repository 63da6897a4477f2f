"""The tokenizer of a base model, from transformers if that is installed."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import LuthierError
from luthier.optional import needed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(base_model: str | None, tokenizer_id: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer that the server names, else that of the base model's name.

    LuthierError if it names neither; ImportError without transformers.
    """
    # A server that runs elsewhere may name a folder of its own machine.
    is_elsewhere = tokenizer_id is not None and _is_absent_folder(tokenizer_id)
    name = base_model if tokenizer_id is None or is_elsewhere else tokenizer_id
    if not name:
        raise LuthierError("the server does not say which tokenizer this model has")
    return load_tokenizer(name)


def _is_absent_folder(name: str) -> bool:
    return Path(name).is_absolute() and not Path(name).is_dir()


@cache
def load_tokenizer(tokenizer_id: str) -> "PreTrainedTokenizerBase":
    """tokenizer_id: a folder, or a Hugging Face id with a revision behind a colon if it needs one.

    ImportError without transformers. No code of a model's repository is run.
    """
    name, _, revision = tokenizer_id.partition(":")
    tokenizer: PreTrainedTokenizerBase = needed(
        "transformers", "get_tokenizer"
    ).AutoTokenizer.from_pretrained(name, revision=revision or None)
    return tokenizer
