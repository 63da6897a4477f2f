"""Model folders that bring code, or weights that are not what they say (reliability S8)."""

import atexit
import json
import pickle  # noqa: TID251
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tests.malicious.harness import Family, Guard
from transformers import LlamaConfig, LlamaForCausalLM

from luthier_core.errors import ConfigError, LuthierError
from luthier_model import base

Folder = Callable[[Path], None]
"""Makes a folder with a good model a poisoned one."""
CANARY = Path(tempfile.gettempdir()) / "luthier-code-of-a-model-folder-was-run"
CODE = f"open({str(CANARY)!r}, 'w')\nclass Own: pass\n"


@cache
def _good_model() -> Path:
    torch.manual_seed(0)
    path = Path(tempfile.mkdtemp(prefix="lu-mf-"))
    atexit.register(shutil.rmtree, path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(path)
    return path


def check(poison: Folder) -> object:
    """As a worker loads it at its start."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(_good_model(), folder, dirs_exist_ok=True)
        poison(Path(folder))
        try:
            return base.load_base_model("tiny", folder)
        except ConfigError as error:
            raise LuthierError(str(error)) from None
        finally:
            assert not CANARY.exists(), "code of the folder was run"


def _edit(name: str, change: Callable[[dict[str, Any]], None]) -> Folder:
    def edit(folder: Path) -> None:
        path = folder / name
        config = json.loads(path.read_text()) if path.exists() else {}
        change(config)
        path.write_text(json.dumps(config))

    return edit


def _with_code(edit: Folder) -> Folder:
    def both(folder: Path) -> None:
        (folder / "own.py").write_text(CODE)
        edit(folder)

    return both


def _auto_map(rng: random.Random) -> dict[str, Any]:
    names = ["AutoModelForCausalLM", "AutoConfig", "AutoTokenizer", "AutoModel"]
    return {"auto_map": {rng.choice(names): "own.Own"}}


def map_of_config(rng: random.Random) -> Folder:
    return _edit("config.json", lambda config: config.update(_auto_map(rng)))


def map_elsewhere(rng: random.Random) -> Folder:
    names = ["tokenizer_config.json", "generation_config.json", "processor_config.json"]
    return _edit(rng.choice(names), lambda config: config.update(_auto_map(rng)))


def nested_map(rng: random.Random) -> Folder:
    part = rng.choice(["text_config", "vision_config", "rope_parameters"])
    return _edit("config.json", lambda config: config.update({part: _auto_map(rng)}))


def unknown_model(rng: random.Random) -> Folder:
    name = rng.choice(["own", "../own", "llama/../own"])
    return _edit("config.json", lambda config: config.update(model_type=name))


def module_beside(rng: random.Random) -> Folder:
    name = rng.choice(["modeling_llama.py", "own.py", "code/__init__.py", "llama.so"])

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE)

    return write


class _Payload:
    def __reduce__(self) -> Any:
        return open, (str(CANARY), "w")


def pickled(rng: random.Random) -> Folder:
    name = rng.choice(["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt"])

    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(_Payload()))

    return write


def pickled_under_another_name(rng: random.Random) -> Folder:
    data = pickle.dumps(_Payload(), rng.randrange(6))
    return lambda folder: (folder / "model.safetensors").write_bytes(data) and None


def torn(rng: random.Random) -> Folder:
    def cut(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: rng.randrange(len(data))])

    return cut


def _weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Folder:
    def rewrite(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def missing(rng: random.Random) -> Folder:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[rng.choice(sorted(tensors))]

    return _weights(change)


def other_shapes(rng: random.Random) -> Folder:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[rng.choice(sorted(tensors))] = torch.zeros(rng.choice([(3,), (3, 5), (99, 99)]))

    return _weights(change)


def shards_elsewhere(rng: random.Random) -> Folder:
    target = rng.choice(["../model.safetensors", "/etc/passwd", "own.py", "a/../../x"])

    def write(folder: Path) -> None:
        names = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def another_folder(rng: random.Random) -> Folder:
    """An adapter's configuration, which names the model that it is for."""
    name = {"base_model_name_or_path": rng.choice([str(_good_model()), "own/model", "../x"])}
    return _edit("adapter_config.json", lambda config: config.update(peft_type="LORA", **name))


def no_config(rng: random.Random) -> Folder:
    text = rng.choice(["", "[]", "null", "{", "\0", "[" * 100_000, '"x"'])
    return lambda folder: (folder / "config.json").write_text(text) and None


MODEL_FOLDERS = Family(
    name="S8 model folders",
    check=check,
    good=lambda: lambda folder: None,
    classes={
        "code by the config": lambda rng: _with_code(map_of_config(rng)),
        "code by another file": map_elsewhere,
        "code by a part of the config": nested_map,
        "unknown models": unknown_model,
        "modules beside": module_beside,
        "pickles": pickled,
        "pickles under another name": pickled_under_another_name,
        "torn weights": torn,
        "missing weights": missing,
        "other shapes": other_shapes,
        "shards elsewhere": shards_elsewhere,
        "another folder": another_folder,
        "no config": no_config,
    },
    guards={
        "what the folder brings": Guard(
            base, "_check_folder", lambda _: None, lets_in="modules beside"
        ),
        "shards": Guard(base, "_check_shards", lambda _: None, lets_in="shards elsewhere"),
    },
    num_inputs=39,
)
