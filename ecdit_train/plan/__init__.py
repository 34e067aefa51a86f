"""What a run would cost: parameters, memory, traffic, time; and a dry run of the real model on fake ranks
(dry_run.py)."""

from .document import to_json
from .plan import Plan, estimate
from .text import render

__all__ = ["Plan", "estimate", "render", "to_json"]
