"""AdapterCache: device, host, and what is left to the store."""

import pytest
import torch

from luthier_model.lora import LoraAdapter, LoraPair, LoraSpec
from luthier_sampler.adapters import AdapterCache, moved, num_bytes

BYTES = 2 * 4 * 3 * 4
"""Of one adapter: A and B of rank 4 on 3 features, float32."""


def adapter(number: float) -> LoraAdapter:
    pair = LoraPair(a=torch.full((4, 3), float(number)), b=torch.full((3, 4), float(number)))
    return LoraAdapter(spec=LoraSpec(rank=4, seed=0), pairs={"lm_head": pair})


def cache(max_adapters: int, num_on_host: int) -> AdapterCache:
    host_bytes = num_on_host * BYTES
    return AdapterCache(max_adapters, host_bytes=host_bytes, device=torch.device("cpu"))


def test_of_hundreds_of_adapters_the_last_are_on_the_device_and_those_before_on_the_host():
    adapters = cache(4, 10)
    for number in range(300):
        adapters.put(f"{number}", adapter(number))
    assert (len(adapters), adapters.num_on_host) == (4, 10)
    assert [number for number in range(300) if f"{number}" in adapters] == list(range(286, 300))


def test_an_adapter_that_comes_back_from_the_host_has_its_own_weights():
    adapters = cache(2, 3)
    for number in range(5):
        adapters.put(f"{number}", adapter(number))
    for number in (0, 3, 1, 4, 2, 0):
        found = adapters.acquire(f"{number}")
        assert float(found.pairs["lm_head"].a[0, 0]) == number
        adapters.release(f"{number}")
    assert (len(adapters), adapters.num_on_host) == (2, 3)


def test_what_is_used_most_recently_stays():
    adapters = cache(2, 0)
    adapters.put("a", adapter(1))
    adapters.put("b", adapter(2))
    adapters.acquire("a")
    adapters.release("a")
    adapters.put("c", adapter(3))
    assert ("a" in adapters, "b" in adapters, "c" in adapters) == (True, False, True)


def test_an_adapter_in_use_stays_on_the_device_beyond_the_limit():
    adapters = cache(1, 0)
    for key in "abc":
        adapters.put(key, adapter(1))
        adapters.acquire(key)
    assert len(adapters) == 3
    for key in "abc":
        adapters.release(key)
    assert len(adapters) == 1
    assert "c" in adapters


def test_an_adapter_that_neither_level_holds_is_an_error():
    adapters = cache(1, 0)
    with pytest.raises(KeyError):
        adapters.acquire("unknown")


def test_a_moved_adapter_keeps_its_spec_and_size():
    there = moved(adapter(1), torch.device("meta"))
    assert (there.spec, num_bytes(there)) == (adapter(1).spec, BYTES)
    assert there.pairs["lm_head"].b.device.type == "meta"
