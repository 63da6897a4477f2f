"""The tokenizer of a base model, from transformers if that is installed."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@cache
def load_tokenizer(tokenizer_id: str) -> "PreTrainedTokenizerBase":
    """tokenizer_id: a folder, or a Hugging Face id with a revision behind a colon if it needs one.

    ImportError without transformers. No code of a model's repository is run.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError("get_tokenizer needs transformers: pip install transformers") from None
    name, _, revision = tokenizer_id.partition(":")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name, revision=revision or None
    )
    return tokenizer
