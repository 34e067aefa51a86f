"""Writing beside the training: this rank's bytes are copied into shared memory, a process of its own (`saver`) does the rest.

The copy is made while the next step computes its gradients, which changes none of what is saved; `Saver.copied` stands before
its update. One save is in flight at a time, in one buffer that is kept from save to save. The copy stays until the save is
committed, so that a saver that died or fell silent is replaced and writes it again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from ecdit_train.checkpoint import saver
from ecdit_train.checkpoint.store import Part
from ecdit_train.parallel.runtime import Json

SPARE = 4096
"""Bytes that the next job may be longer than this one."""


class SaverLostError(Exception):
    """The saver died or took too long; what it was to write is still in memory."""


class Memory:
    """Bytes that another process can map (no file system behind them, so no /dev/shm that could be too small)."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.descriptor = os.memfd_create("ecdit-checkpoint", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, nbytes)
            self._map = mmap.mmap(self.descriptor, nbytes)
        except OSError:
            os.close(self.descriptor)
            raise
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._pinned = torch.cuda.is_available() and self._pin()

    def _pin(self) -> bool:
        """Registered with CUDA, copies from the device run at the bus's speed; a refusal only costs speed."""
        return int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self.nbytes, 0)) == 0

    def places(self, views: list[torch.Tensor], *, starts: list[int]) -> list[torch.Tensor]:
        """A view of this memory for each of `views`: its dtype and shape, row-major, from its start."""
        return [
            self._bytes[start : start + view.numel() * view.element_size()].view(view.dtype).view(view.shape)
            for view, start in zip(views, starts, strict=True)
        ]

    @torch.no_grad()
    def put(self, views: list[torch.Tensor], places: list[torch.Tensor]) -> None:
        """Copy each view to its place; in one call, which lets the training's Python run meanwhile."""
        if views:
            torch._foreach_copy_(places, views, non_blocking=self._pinned)

    def put_bytes(self, data: bytes, *, start: int) -> None:
        self._map[start : start + len(data)] = data

    def close(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        del self._bytes
        with contextlib.suppress(BufferError):  # a view that somebody still holds; the pages go with the process
            self._map.close()
        os.close(self.descriptor)


class Copy:
    """Bytes on their way into memory, in a thread and, of a device, on a stream of its own: behind what the device was asked for
    before, beside what it is asked for from now on."""

    def __init__(self, memory: Memory, views: list[torch.Tensor], *, starts: list[int]) -> None:
        self._error: Exception | None = None
        places = memory.places(views, starts=starts)
        # Asked here: streams and the current device belong to a thread.
        device = next((view.device for view in views if view.is_cuda), None)
        asked = None if device is None else torch.cuda.current_stream(device).record_event()

        def put() -> None:
            try:
                if asked is None:
                    memory.put(views, places)
                    return
                beside = torch.cuda.Stream(device)
                with torch.cuda.stream(beside):
                    beside.wait_event(asked)
                    memory.put(views, places)
                beside.synchronize()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=put, name="checkpoint-copy", daemon=True)
        self._thread.start()

    def wait(self) -> Exception | None:
        """Until all is there; what went wrong instead."""
        self._thread.join()
        return self._error


class Saver:
    """This rank's saver process and the memory it reads. One part at a time: `start`, `copied`, then `report` once
    it is not `busy`."""

    def __init__(self, *, patience: float) -> None:
        """`patience`: seconds after which a part that is not written counts as lost."""
        self.patience = patience
        self._process: subprocess.Popen | None = None
        self._channel: socket.socket | None = None
        self._memory: Memory | None = None
        self._copying: tuple[Copy, Part] | None = None
        self._answer: Json = None
        self._id = ""
        """Of the save that is being written: an answer about another one is not ours."""
        self._since = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, part: Part, views: list[torch.Tensor]) -> None:
        """Begin to copy `views` (one for each chunk of `part`); they must not change before `copied` returns. Raises MemoryError
        where the host has no room."""
        starts, size = saver.offsets(part), saver.room(part) + len(saver.encoded(part)) + SPARE
        if self._memory is None or self._memory.nbytes < size:
            if self._memory is not None:
                self._memory.close()
                self._memory = None
            # All ranks of a host ask at once, before any of them has touched its pages.
            share = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if size > share * 0.9:
                raise MemoryError(
                    f"a copy for saving in the background takes {size} bytes, this rank's share of free memory is {share:.0f}"
                )
            self._memory = Memory(size)
        self._answer = None
        self._copying = Copy(self._memory, views, starts=starts), part

    def copied(self) -> None:
        """Wait for the copy and hand it to the process that writes; nothing where that is done."""
        copying, self._copying = self._copying, None
        if copying is None:
            return
        copy, part = copying
        if (error := copy.wait()) is None:
            self._send(part)
        else:
            self._answer = {"failed": [type(error).__name__, getattr(error, "errno", None), str(error)]}

    def again(self, part: Part) -> None:
        """Hand the same bytes to a new saver, for another folder."""
        self._end()
        self._send(part)

    def _send(self, part: Part) -> None:
        assert self._memory is not None
        self._answer, self._since = None, time.monotonic()
        if self._process is None or self._process.poll() is not None:
            self._spawn()
        assert self._channel is not None
        # The job lies behind the bytes, so that what goes through the socket is small and never waits for the saver.
        job, start = saver.encoded(part), saver.room(part)
        self._id = part.id
        self._memory.put_bytes(job, start=start)
        with contextlib.suppress(OSError):  # `busy` finds it dead
            saver.send(self._channel, [start, len(job)], descriptors=(self._memory.descriptor,))

    def _spawn(self) -> None:
        self._end()
        ours, theirs = socket.socketpair()
        env = os.environ | {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        root = str(Path(__file__).parents[2])  # a source tree that is not installed
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {saver.__name__} import main; main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            env=env,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._channel = ours

    @property
    def busy(self) -> bool:
        """Whether the part is still being copied or written; False when it is written, failed or lost. Never waits."""
        if self._copying is not None:
            return True
        if self._answer is not None or self._channel is None:
            return False
        assert self._process is not None
        self._channel.setblocking(False)
        try:
            waiting = not self._channel.recv(1, socket.MSG_PEEK)
            gone = waiting  # end of the stream
        except BlockingIOError:
            waiting, gone = True, self._process.poll() is not None
        except OSError:
            waiting, gone = True, True
        finally:
            self._channel.setblocking(True)
        if not waiting:
            self._take()
            return self._answer is None
        if gone:
            code = self._process.poll()
            how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"left ({code})"
            self._answer = {"lost": f"the saver {how}"}
        elif time.monotonic() - self._since > self.patience:
            self._answer = {"lost": f"the saver took longer than {self.patience:g} s (a third of watch.save)"}
        return self._answer is None

    def _take(self) -> None:
        assert self._channel is not None
        self._channel.settimeout(10)
        try:
            answer, _ = saver.receive(self._channel)
            if answer.get("id") == self._id:
                self._answer = answer
        except (EOFError, OSError) as error:
            self._answer = {"lost": f"the saver left in the middle of its answer ({error!r})"}
        finally:
            self._channel.settimeout(None)

    def report(self) -> Json:
        """What `store.write` returned there. Raises OSError (what the disk said) or SaverLostError."""
        self.copied()
        while self.busy:
            time.sleep(0.01)
        answer = self._answer
        if "report" in answer:
            return answer["report"]
        self._end()
        if "lost" in answer:
            raise SaverLostError(answer["lost"])
        kind, number, words = answer["failed"]
        raise OSError(number, words) if number is not None else RuntimeError(f"{kind}: {words}")

    def _end(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # it waits in the kernel for a disk that does not answer
                self._process.wait(1)
            self._process = None

    def close(self) -> None:
        """End the saver, whatever it does."""
        if self._copying is not None:
            self._copying[0].wait()
            self._copying = None
        self._end()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its control group where that is less."""
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(known["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(free, 0)
