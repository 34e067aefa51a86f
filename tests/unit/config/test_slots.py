"""From a name in YAML to a class: what is refused, what is read without torch, what a broken file of a user's says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ecdit_train.config.resolve import declarations_only, resolve
from ecdit_train.config.slots import RouterConfig
from ecdit_train.errors import ConfigError

ROUTER = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from ecdit_train.config.slots import RouterConfig
{before}
@dataclass(frozen=True, kw_only=True)
class Mine(RouterConfig):
    factor: float
    def experts_per_token(self): return {value}
    def capacity(self, *, group_tokens, num_experts): return None
    def build(self, sizes): return torch.nn.Linear(sizes.width, sizes.num_experts)
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Writes a module of this test's own; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"slot_module_{abs(hash(request.node.name))}"

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return name

    return write


def rule(target: object, base: type = RouterConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(target, base, field="moe.router")
    (problem,) = caught.value.problems
    assert problem.field == "moe.router._target_"
    return str(problem)


def test_what_names_no_class():
    assert "must name a class" in rule(3)
    assert "must name a class" in rule("Mine")
    assert "must name a class" in rule(".Mine")
    assert "there is no module nowhere.at" in rule("nowhere.at.All")
    shipped = "ecdit_train.model.routers.expert_choice"
    assert rule(f"{shipped}.ExpertChose").endswith(f"has no ExpertChose; nearest valid: {shipped}.ExpertChoice")


def test_only_a_frozen_dataclass_of_the_slot_fills_it(module):
    assert "is not a frozen dataclass that extends" in rule("os.path.join")
    assert "is not a frozen dataclass that extends" in rule("ecdit_train.model.experts.gelu.Gelu")
    name = module(ROUTER.format(before="", value=2.0).replace("frozen=True, ", ""))
    assert "is not a frozen dataclass that extends" in rule(f"{name}.Mine")


@pytest.mark.parametrize("text", ["def broken(:\n", "raise TypeError('no')\n", "import nowhere_at_all\n"])
def test_a_file_that_cannot_run_is_one_line(module, text):
    name = module(text)
    assert rule(f"{name}.Mine").startswith(f"moe.router._target_ = '{name}.Mine': {name} cannot be imported: ")


@pytest.mark.parametrize(
    ("before", "value", "expected", "whole"),
    [
        ("", "self.factor", 1.5, False),
        ("LIMIT = -3.0 ** 2", "LIMIT", -9.0, False),
        ("def twice(x): return 2 * x", "twice(self.factor)", 3.0, False),
        ("def unused(): return torch.zeros(3)", "[f for f in (self.factor,)][0]", 1.5, False),
        ("LIMIT = float(torch.tensor(4.0))", "LIMIT", 4.0, True),
        ("def wide(): return float(torch.tensor(5.0))", "wide()", 5.0, True),
    ],
)
def test_declarations_are_enough_or_the_file_is_imported_whole(module, before, value, expected, whole):
    """Rules and costs never meet a name that was left out."""
    name = module(ROUTER.format(before=before, value=value))
    with declarations_only():
        cls = resolve(f"{name}.Mine", RouterConfig, field="moe.router")
    assert cls.target() == f"{name}.Mine"
    assert cls(factor=1.5).experts_per_token() == expected
    assert (name in sys.modules) == whole
    again = resolve(f"{name}.Mine", RouterConfig, field="moe.router")
    assert again.target() == f"{name}.Mine"


def test_no_shipped_slot_needs_torch_to_be_checked():
    code = (
        "import sys; from ecdit_train.config import installed, resolve\n"
        "with resolve.declarations_only(): found = installed.installed()\n"
        "assert all(c.broken is None for choices in found.values() for c in choices), found\n"
        "assert all(found.values()), found\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3]).returncode == 0
