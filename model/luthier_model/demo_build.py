"""Trains the demo model's tokenizer and weights, and writes them as one folder.

Apart from demo.py because of what it imports: a start of the stack that finds the model built does
not wait for torch.
"""

import itertools
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from luthier_model.demo import Progress
from luthier_model.demo_text import IM_END, IM_START, document

NUM_STEPS = 600
"""About 30 s on one idle core."""

VOCAB_SIZE = 512
"""256 bytes, 3 special tokens and few merges: small pieces keep the letters of a word visible."""

MAX_CONTEXT_TOKENS = 2048

_PAD = "<|endoftext|>"
_SEED = 20
_ROWS_PER_STEP = 8
_ROW_TOKENS = 64
_PEAK_LEARNING_RATE = 4e-3
_WARMUP_STEPS = 20
_NUM_TOKENIZER_DOCUMENTS = 4000

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def build_demo_model(
    folder: Path, *, num_steps: int = NUM_STEPS, progress: Progress | None = None
) -> None:
    """Writes model and tokenizer to `folder` in Hugging Face's format.

    `folder` appears complete or not at all. FileExistsError if it is there already; OSError if it
    cannot be written or another process made it meanwhile.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        tokenizer = train_tokenizer()
        transformers_logging.disable_progress_bar()
        with _reproducible():
            model = _train_model(tokenizer, num_steps, progress)
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        for file in unfinished.iterdir():
            _sync(file)
        unfinished.rename(folder)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens: any text survives encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[_PAD, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = itertools.islice(_documents(_SEED), _NUM_TOKENIZER_DOCUMENTS)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=_PAD,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_CONTEXT_TOKENS,
        chat_template=_CHAT_TEMPLATE,
    )


def _train_model(
    tokenizer: PreTrainedTokenizerFast, num_steps: int, progress: Progress | None
) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(_model_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    batches = _batches(tokenizer)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, num_steps)
        tokens, positions = next(batches)
        loss = model(input_ids=tokens, position_ids=positions, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, num_steps, loss.item())
    return model.eval()


def _model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.06,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
    return _PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and positions, both int64 [_ROWS_PER_STEP, _ROW_TOKENS], of packed documents.

    Positions begin at 0 with every document: from that transformers keeps documents apart.
    """
    documents = _documents(_SEED + 1)
    while True:
        tokens, positions = [], []
        for _ in range(_ROWS_PER_STEP):
            row_tokens, row_positions = _row(documents, tokenizer)
            tokens.append(row_tokens)
            positions.append(row_positions)
        yield torch.tensor(tokens), torch.tensor(positions)


def _row(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    positions: list[int] = []
    while len(tokens) < _ROW_TOKENS:
        document_tokens = [*tokenizer.encode(next(documents)), tokenizer.eos_token_id]
        tokens += document_tokens
        positions += range(len(document_tokens))
    return tokens[:_ROW_TOKENS], positions[:_ROW_TOKENS]


def _documents(seed: int) -> Iterator[str]:
    random = Random(seed)
    while True:
        yield document(random)


def _sync(file: Path) -> None:
    # Before the rename: a power cut must not leave a complete-looking folder of empty files.
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


@contextmanager
def _reproducible() -> Iterator[None]:
    """Fixed seed and thread count inside; the caller's are back afterwards."""
    num_threads = torch.get_num_threads()
    # With one thread, sums are taken in one order however many cores there are.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            yield
    finally:
        torch.set_num_threads(num_threads)
