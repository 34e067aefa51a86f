"""What `ecdit dash apply` would send, to the byte: a change of the definition or of wandb-workspaces is seen here.

pytest tests/golden/test_golden_dashboard.py --update-golden
"""

from __future__ import annotations

import json
from pathlib import Path

from ecdit_train.observe import dashboard, wandb_views

GOLDEN = Path(__file__).with_name("dashboard") / "payload.json"


def test_what_would_be_sent(update):
    known = [pattern.replace("*", "data/") for pattern in dashboard.patterns()]  # whatever METRICS has today
    sent = wandb_views.payload(dashboard.read(known=known), entity="me", project="p")
    text = json.dumps(sent, indent=1, sort_keys=True) + "\n"
    if update:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
