"""What a run would cost: parameters, memory, traffic, time; and a dry run of the real model
on fake ranks (dry_run.py)."""

from .document import render, to_json
from .plan import Plan, estimate

__all__ = ["Plan", "estimate", "render", "to_json"]
