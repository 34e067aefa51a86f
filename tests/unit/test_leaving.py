"""A finished verb's exit code stands, whatever threads do while the interpreter is taken apart."""

import os
import signal
import subprocess
import sys

import pytest

BUSY = """
import atexit, sys, threading, time
import torch
from ecdit_train.leaving import as_decided

def work():
    a = torch.zeros(100)
    while True:
        a = a + 1

def main():
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    atexit.register(print, "closed", end="")
    time.sleep(0.2)
    {end}

{call}
"""


def run(call, end="sys.exit(75)"):
    return subprocess.run(
        [sys.executable, "-c", BUSY.format(call=call, end=end)], capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(75)", 75), ("sys.exit(0)", 0), ("sys.exit()", 0), ("sys.exit('bad')", 1)]
)
def test_the_code_stands_and_hooks_are_called(end, code):
    done = run("as_decided(main)", end)
    assert (done.returncode, done.stdout, done.stderr) == (code, "closed", "bad\n" if code == 1 else "")


def test_an_error_is_an_error_and_no_signal():
    done = run("as_decided(main)", "raise ValueError('bad')")
    assert (done.returncode, done.stdout) == (1, "closed")
    assert done.stderr.endswith("ValueError: bad\n")


@pytest.mark.parametrize(("code", "said"), [(0, 120), (75, 75)])
def test_words_that_cannot_be_written(code, said):
    program = f"import sys\nfrom ecdit_train.leaving import as_decided\ndef main(): print('x'); sys.exit({code})\nas_decided(main)"
    with open("/dev/full", "w") as full:
        held = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        assert subprocess.run([sys.executable, "-c", program], stdout=full, env=held, check=False).returncode == said


def test_a_first_interrupt_stays_a_signal():
    program = "from ecdit_train.leaving import as_decided\ndef main(): raise KeyboardInterrupt\nas_decided(main)"
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGINT


def test_without_it_such_a_thread_is_the_end():
    """Else this file proves nothing."""
    done = run("main()")
    assert done.returncode == -6
    assert "terminate called without an active exception" in done.stderr
