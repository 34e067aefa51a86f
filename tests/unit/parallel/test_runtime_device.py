"""What a CUDA rank tells torch as it joins; NCCL and the device are stood in for, so the calls are all that is held here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ecdit_train.parallel import runtime

ENV = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def told(monkeypatch) -> dict[str, Any]:
    said: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.setdefault("current", device))
    monkeypatch.setattr(
        torch._C, "_accelerator_setAllocatorSettings", lambda words: said.setdefault("allocator", words)
    )
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: said.update(kwargs, backend=args[0]))
    monkeypatch.setattr(dist, "new_group", lambda **kwargs: said.update(control=kwargs["backend"]))
    for name in runtime.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    return said


def test_nccl_is_told_its_device_and_memory_comes_in_segments_that_grow(told):
    runtime.start("cuda", env=ENV, store=dist.HashStore())
    assert told["device_id"] == told["current"] == torch.device("cuda", 1)
    assert told["backend"] == "cpu:gloo,cuda:nccl"
    assert told["control"] == "gloo"
    assert told["allocator"] == "expandable_segments:True"


def test_a_users_own_allocator_settings_stay(told, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    runtime.start("cuda", env=ENV, store=dist.HashStore())
    assert "allocator" not in told


def test_a_cpu_rank_is_bound_to_no_device(told):
    runtime.start("cpu", env=ENV, store=dist.HashStore())
    assert told["device_id"] is None
    assert "allocator" not in told
