"""Runs one training loop of `tinker_cookbook`, unchanged, on data of its own.

    TINKER_BASE_URL=... TINKER_API_KEY=... python recipes.py supervised --model NAME --log FOLDER

It runs in the cookbook's environment and imports nothing of Luthier. What a loop measured is in
FOLDER/metrics.jsonl, which the cookbook writes.
"""

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import chz
from tinker_cookbook.distillation import train_off_policy, train_on_policy
from tinker_cookbook.distillation.datasets import (
    DistillationDatasetConfig,
    PromptOnlyDataset,
    TeacherConfig,
)
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.rl.types import RLDatasetBuilder
from tinker_cookbook.supervised import train as supervised_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer

RENDERER = "qwen3_instruct"
"""The demo model's tokenizer has the marks of this chat format."""
WORDS = ("violin", "cello", "viola", "bow", "bridge", "string", "peg", "scroll")


@chz.chz
class PromptsBuilder(RLDatasetBuilder):
    """Prompts of one's own, as PromptOnlyDatasetBuilder has those of the Hub."""

    prompts: list[str]
    groups_per_batch: int
    group_size: int
    model_name_for_tokenizer: str
    renderer_name: str

    async def __call__(self) -> tuple[PromptOnlyDataset, None]:
        tokenizer = get_tokenizer(self.model_name_for_tokenizer)
        dataset = PromptOnlyDataset(
            prompts=self.prompts,
            batch_size=self.groups_per_batch,
            group_size=self.group_size,
            renderer=get_renderer(self.renderer_name, tokenizer=tokenizer),
            tokenizer=tokenizer,
        )
        return dataset, None


async def supervised(options: argparse.Namespace) -> None:
    await supervised_train.main(
        supervised_train.Config(
            log_path=str(options.log),
            model_name=options.model,
            recipe_name="recipe_sl_basic",
            renderer_name=RENDERER,
            dataset_builder=conversations(options),
            learning_rate=5e-3,
            num_epochs=6,
            lora_rank=16,
            save_every=8,
            eval_every=8,
        )
    )


async def dpo(options: argparse.Namespace) -> None:
    pairs = [
        {
            "comparison": {
                "prompt_conversation": [{"role": "user", "content": question(word)}],
                "completion_A": [{"role": "assistant", "content": answer(word)}],
                "completion_B": [{"role": "assistant", "content": "I do not know."}],
            },
            "label": "A",
        }
        for word in WORDS * 4
    ]
    config = train_dpo.Config(
        log_path=str(options.log),
        model_name=options.model,
        recipe_name="recipe_preference_dpo",
        renderer_name=RENDERER,
        dataset_builder=DPODatasetBuilderFromComparisons(
            common_config=common(options),
            comparison_builder=ComparisonBuilderFromJsonl(
                train_path=write_lines(options.log, "pairs.jsonl", pairs)
            ),
        ),
        learning_rate=1e-3,
        dpo_beta=0.1,
        lora_rank=16,
        num_epochs=2,
    )
    await asyncio.to_thread(train_dpo.main, config)


async def on_policy(options: argparse.Namespace) -> None:
    dataset = PromptsBuilder(
        prompts=[question(word) for word in WORDS] * 30,
        groups_per_batch=8,
        group_size=8,
        model_name_for_tokenizer=options.model,
        renderer_name=RENDERER,
    )
    await train_on_policy.main(
        train_on_policy.Config(
            log_path=str(options.log),
            model_name=options.model,
            recipe_name="recipe_distillation_on_policy",
            renderer_name=RENDERER,
            dataset_configs=[
                DistillationDatasetConfig(
                    dataset_builder=dataset, teacher_config=teacher(options), groups_per_batch=8
                )
            ],
            learning_rate=4e-3,
            max_tokens=8,
            lora_rank=16,
            save_every=10,
        )
    )


async def off_policy(options: argparse.Namespace) -> None:
    await train_off_policy.main(
        train_off_policy.Config(
            log_path=str(options.log),
            model_name=options.model,
            recipe_name="recipe_distillation_off_policy",
            renderer_name=RENDERER,
            dataset_configs=[
                train_off_policy.DatasetWithTeacher(
                    dataset_builder=conversations(options), teacher_config=teacher(options)
                )
            ],
            learning_rate=5e-3,
            lora_rank=16,
            n_teacher_targets=5,
            batch_size=8,
            save_every=2,
        )
    )


RECIPES: dict[str, Callable[[argparse.Namespace], Awaitable[None]]] = {
    "supervised": supervised,
    "dpo": dpo,
    "on_policy": on_policy,
    "off_policy": off_policy,
}


# --- data and parts of a configuration ------------------------------------------------------------


def question(word: str) -> str:
    return f"Spell {word} backwards."


def answer(word: str) -> str:
    return f"It is {word[::-1]}."


def conversations(options: argparse.Namespace) -> FromConversationFileBuilder:
    rows = [
        {
            "messages": [
                {"role": "user", "content": question(word)},
                {"role": "assistant", "content": answer(word)},
            ]
        }
        for word in WORDS * 5
    ]
    random.Random(1).shuffle(rows)
    path = write_lines(options.log, "conversations.jsonl", rows)
    return FromConversationFileBuilder(common_config=common(options), file_path=path, test_size=8)


def common(options: argparse.Namespace) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=options.model,
        renderer_name=RENDERER,
        max_length=256,
        batch_size=8,
    )


def teacher(options: argparse.Namespace) -> TeacherConfig:
    return TeacherConfig(base_model=options.model, load_checkpoint_path=options.teacher)


def write_lines(folder: Path, name: str, rows: list[dict[str, object]]) -> str:
    path = folder.parent / f"{folder.name}-{name}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--model", required=True, help="the name that it is served under")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--teacher", help="sampler weights of the teacher; default: the base model")
    options = parser.parse_args()
    asyncio.run(RECIPES[options.recipe](options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
