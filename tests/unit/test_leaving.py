"""A finished verb's exit code stands, whatever threads do while the interpreter is taken apart."""

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


@pytest.mark.parametrize(("end", "code"), [("sys.exit(75)", 75), ("sys.exit(0)", 0), ("sys.exit()", 0)])
def test_the_code_stands_and_hooks_are_called(end, code):
    done = run("as_decided(main)", end)
    assert (done.returncode, done.stdout, done.stderr) == (code, "closed", "")


def test_without_it_such_a_thread_is_the_end():
    """Else this file proves nothing."""
    done = run("main()")
    assert done.returncode == -6
    assert "terminate called without an active exception" in done.stderr


@pytest.mark.parametrize("end", ["raise ValueError('bad')", "sys.exit('words')"])
def test_other_ends_are_pythons(end):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom ecdit_train.leaving import as_decided\ndef main(): {end}\nas_decided(main)"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith(("bad\n", "words\n"))
