"""What a rank says of the error that ended it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ecdit_train.errors import NonFiniteError, OutOfMemoryError, PeerLostError
from ecdit_train.joining import ending
from ecdit_train.supervise.beats import Heart

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "


@pytest.mark.parametrize("error", [
    RuntimeError(f"{GLOO}Connection closed by peer [10.77.0.12]:41022"),
    RuntimeError(f"{GLOO}Read error [10.77.0.12]:41022: Connection reset by peer"),
    RuntimeError(f"{GLOO}writev [10.77.0.12]:41022: No route to host"),
    RuntimeError(f"{GLOO}Read error [10.77.0.12]:41022: Connection timed out"),
    RuntimeError(f"{GLOO}Application timeout caused pair closure"),
    RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 90000ms for recv operation to complete"),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
    dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
], ids=lambda error: str(error)[-24:])  # fmt: skip
def test_a_connection_that_breaks_is_a_lost_peer(error, tmp_path):
    code, why = ending(error, Heart(tmp_path, rank=0))
    assert code == PeerLostError.exit_code
    assert why == f"PeerLostError: another rank left in the middle of an exchange: {error}"


@pytest.mark.parametrize(("error", "code"), [
    (RuntimeError(f"{GLOO}op.preamble.length <= op.nbytes. 120 vs 60"), 1),
    (RuntimeError("size mismatch"), 1),
    (ConnectionResetError(104, "Connection reset by peer"), 1),
    (NonFiniteError("the loss is nan"), NonFiniteError.exit_code),
])  # fmt: skip
def test_other_errors_are_told_as_they_are(error, code, tmp_path):
    assert ending(error, Heart(tmp_path, rank=0)) == (code, f"{type(error).__name__}: {error}")


def test_a_rank_of_this_machine_that_failed_tells_it_better(tmp_path):
    Heart(tmp_path, rank=1).failed(NonFiniteError("the loss is nan"))
    code, why = ending(RuntimeError(f"{GLOO}Connection closed by peer"), Heart(tmp_path, rank=0))
    assert code == NonFiniteError.exit_code
    assert "the loss is nan" in why


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
)


@pytest.mark.parametrize(("error", "words"), [
    (torch.OutOfMemoryError(f"{CUDA} If reserved but unallocated memory is large try setting X"), "Tried to allocate 2.00 GiB"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "cublasCreate"),
    (dist.DistBackendError("NCCL error: unhandled cuda error\nLast error: Cuda failure 2 'out of memory'"), "NCCL error"),
    (MemoryError(), "no memory"),
], ids=["torch", "cublas", "nccl", "host"])  # fmt: skip
def test_a_full_memory_says_where_and_what_takes_less(error, words, tmp_path):
    code, why = ending(error, Heart(tmp_path, rank=0))
    assert code == OutOfMemoryError.exit_code
    assert why.startswith("OutOfMemoryError: no memory left: ")
    assert words in why
    assert "train.microbatch" in why
    assert "If reserved" not in why


def test_a_host_without_memory_is_known_by_its_words(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58)
    assert ending(caught.value, Heart(tmp_path, rank=0))[0] == OutOfMemoryError.exit_code
