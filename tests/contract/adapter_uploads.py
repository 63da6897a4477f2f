"""Adapters to upload: one that is good, and what may be tried instead of one."""

import hashlib
import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.contract.gateway_client import BASE_MODEL, Answer, Api
from tests.malicious import tensor_files
from tests.malicious.tensor_files import entry, file_of

MODULE = "model.layers.0.self_attn.q_proj"
"""Of the tiny model: 32 features in, 32 out."""
RANK = 2
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": [MODULE]}
_A, _B = (f"base_model.model.{MODULE}.lora_{factor}.weight" for factor in "AB")
_HALF = 4 * RANK * 32


def weights(seed: int = 1) -> bytes:
    """A file with both factors of the module."""
    rng = random.Random(seed)
    values = [rng.uniform(-0.5, 0.5) for _ in range(2 * RANK * 32)]
    return factors([RANK, 32], [32, RANK], struct.pack(f"<{len(values)}f", *values))


def factors(a: list[int], b: list[int], data: bytes) -> bytes:
    half = len(data) // 2
    return file_of([(_A, entry(a, 0, half)), (_B, entry(b, half, 2 * half))], data)


@dataclass(frozen=True, slots=True)
class Attempt:
    """An announcement and the bytes that follow it."""

    config: dict[str, Any]
    body: bytes
    name: str = "x"
    announced: bytes | None = None
    """Whose length and digest are announced; None: of the body."""
    num_bytes: int | None = None
    upload_id: str | None = None
    """Where it is sent instead of where it was announced."""

    async def send(self, api: Api, **headers: str) -> Answer:
        """The answer to the weights, or to the announcement if that is refused."""
        about = self.body if self.announced is None else self.announced
        wanted = {
            "base_model": BASE_MODEL,
            "adapter_config": self.config,
            "num_bytes": len(about) if self.num_bytes is None else self.num_bytes,
            "sha256": hashlib.sha256(about).hexdigest(),
            "name": self.name,
        }
        created = await api.post("uploads", wanted, **headers)
        if created.status != 200:
            return created
        upload_id = self.upload_id or created.json()["upload_id"]
        return await api.call(
            "PUT", f"uploads/{upload_id}", self.body, content_type="application/octet-stream"
        )


GOOD = Attempt(CONFIG, weights())

Hostile = Callable[[random.Random], Attempt]


def _variant(rng: random.Random) -> Attempt:
    change: dict[str, Any] = rng.choice(
        [
            {"use_dora": True},
            {"peft_type": "LOHA"},
            {"modules_to_save": ["lm_head"]},
            {"init_lora_weights": "pissa"},
            {"rank_pattern": {MODULE: 4}},
            {"bias": "all"},
            {"layer_replication": [[0, 1]]},
            {"lora_alpha": 0},
            {"lora_alpha": -1.0},
            {"use_rslora": "yes"},
        ]
    )
    return replace(GOOD, config={**CONFIG, **change})


def _unknown_key(rng: random.Random) -> Attempt:
    key = rng.choice(["corda_config", "__class__", "eva_config", "../x", "loader", "kasa_config"])
    return replace(GOOD, config={**CONFIG, key: rng.choice([{"a": 1}, "os.system", 1, ["x"]])})


def _rank(rng: random.Random) -> Attempt:
    rank: Any = rng.choice([0, -1, 257, 2**40, 2.5, "2", None, True, [2]])
    return replace(GOOD, config={**CONFIG, "r": rank})


def _name(rng: random.Random) -> Attempt:
    names = [
        "../x",
        "a/b",
        "/etc/passwd",
        "",
        "x\0y",
        "..",
        ".hidden",
        "x" * 129,
        "ä",
        "x\n",
        "%2e",
    ]
    return replace(GOOD, name=rng.choice(names))


def _digest(rng: random.Random) -> Attempt:
    return replace(GOOD, announced=weights(rng.randrange(2, 1000)))


def _length(rng: random.Random) -> Attempt:
    wrong = len(GOOD.body) + rng.choice([-100, -1, 1, 1000])
    return replace(GOOD, num_bytes=wrong)


def _enormous(rng: random.Random) -> Attempt:
    return replace(GOOD, num_bytes=rng.choice([2**31, 2**40, 2**50, 2**63, 0, -1]))


def _truncated(rng: random.Random) -> Attempt:
    return replace(GOOD, body=GOOD.body[: rng.randrange(1, len(GOOD.body))])


def _not_finite(rng: random.Random) -> Attempt:
    body = bytearray(GOOD.body)
    at = len(body) - 4 * rng.randrange(1, 2 * RANK * 32)
    body[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf")]))
    return replace(GOOD, body=bytes(body))


def _shapes(rng: random.Random) -> Attempt:
    a, b = rng.choice([([32, 2], [32, 2]), ([2, 32], [2, 32]), ([64], [64]), ([1, 64], [64, 1])])
    return replace(GOOD, body=factors(a, b, bytes(2 * _HALF)))


def _foreign_tensors(rng: random.Random) -> Attempt:
    name = rng.choice(
        [
            "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
            "base_model.model.../../x.lora_A.weight",
            "lm_head.bias",
            "base_model.model.lm_head.weight",
            f"base_model.model.{MODULE}.lora_C.weight",
            "x" * 5000,
        ]
    )
    data = bytes(2 * _HALF + 16)
    parts = [(_A, entry([2, 32], 0, _HALF)), (_B, entry([32, 2], _HALF, 2 * _HALF))]
    return replace(
        GOOD, body=file_of([*parts, (name, entry([4], 2 * _HALF, 2 * _HALF + 16))], data)
    )


def _misleading(rng: random.Random) -> Attempt:
    """Files that a loader could be misled by."""
    kinds = [tensor_files.overlap, tensor_files.alias, tensor_files.twice, tensor_files.gap]
    kinds += [tensor_files.enormous, tensor_files.long_header, tensor_files.no_header]
    return replace(GOOD, body=rng.choice(kinds)(rng))


def _archive(rng: random.Random) -> Attempt:
    """What would do harm to a server that unpacks it."""
    out = io.BytesIO()
    member = rng.choice(["../../outside", "/tmp/outside", "adapter_model.safetensors"])
    if rng.random() < 0.5:
        with tarfile.open(fileobj=out, mode=rng.choice(["w", "w:gz"])) as tar:
            link = tarfile.TarInfo(member)
            link.type, link.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "/etc"
            tar.addfile(link)
    else:
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr(member, GOOD.body)
    return replace(GOOD, body=out.getvalue())


def _elsewhere(rng: random.Random) -> Attempt:
    ids = ["0" * 32, "..", "%2e%2e", "a" * 5000, "..%2f..%2fkeys", "x%00", "%ff"]
    return replace(GOOD, upload_id=rng.choice(ids))


HOSTILE: dict[str, Hostile] = {
    "variants of LoRA": _variant,
    "unknown keys": _unknown_key,
    "ranks": _rank,
    "names": _name,
    "other bytes than announced": _digest,
    "other lengths than announced": _length,
    "enormous": _enormous,
    "truncated": _truncated,
    "not finite": _not_finite,
    "shapes": _shapes,
    "foreign tensors": _foreign_tensors,
    "misleading files": _misleading,
    "archives": _archive,
    "other uploads": _elsewhere,
}


def hostile(num_attempts: int, seed: int = 7) -> Iterator[tuple[str, Attempt]]:
    """(class, attempt), the classes in turns."""
    rng, names = random.Random(seed), list(HOSTILE)
    for number in range(num_attempts):
        name = names[number % len(names)]
        yield name, HOSTILE[name](rng)
