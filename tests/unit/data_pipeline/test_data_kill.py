"""The real thing: a process killed with SIGKILL at any moment, and resumed from its last saved state."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View

_CHILD = """
import json, os, sys, time
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view
folder, log, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
stream = StreamingLoader(open_view(folder), global_batch=32, seed=3, resolution=16, threads=3, prefetch=4)
lines = open(log).read().splitlines() if os.path.exists(log) else []
if lines:
    stream.load_state_dict(json.loads(lines[-1])["state"])
with open(log, "a") as file:
    while stream.state_dict()["step"] < steps:
        keys = next(stream).keys
        file.write(json.dumps({"keys": keys, "state": stream.state_dict()}) + chr(10))
        file.flush()
        time.sleep(0.004)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_random_and_resumed_nothing_is_lost_or_repeated(shapes_view: View, tmp_path: Path) -> None:
    steps, log, chance = 60, tmp_path / "steps.jsonl", random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    lives = 0
    while lives < 12:
        lives += 1
        command = [sys.executable, "-c", _CHILD, str(shapes_view.folder), str(log), str(steps)]
        with subprocess.Popen(command, env=environment) as child:
            seen = log.stat().st_size if log.exists() else 0
            while child.poll() is None and (not log.exists() or log.stat().st_size == seen):
                time.sleep(0.002)  # until this life delivers something
            time.sleep(chance.uniform(0.0, 0.1))
            finished = child.poll() == 0
            child.kill()
        if finished:
            break
    assert lives > 1
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    straight = StreamingLoader(shapes_view, global_batch=32, seed=3, resolution=16)
    assert [row["keys"] for row in rows] == [list(next(straight).keys) for _ in range(steps)]
    straight.close()
