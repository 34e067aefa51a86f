"""The exit code that a rank leaves for a job script that starts it with torchrun."""

from __future__ import annotations

from pathlib import Path

from ecdit_train.supervise.exit_file import leave_exit_code


def test_the_first_failure_is_kept(tmp_path):
    target = tmp_path / "exit"
    leave_exit_code(0, environ={"ECDIT_EXIT_FILE": str(target)})
    assert not target.exists()
    leave_exit_code(80, environ={"ECDIT_EXIT_FILE": str(target)})
    leave_exit_code(75, environ={"ECDIT_EXIT_FILE": str(target)})  # terminated because of the first: too late
    assert target.read_text() == "80\n"


def test_nobody_asked_or_nowhere_to_write():
    leave_exit_code(75, environ={})
    leave_exit_code(75, environ={"ECDIT_EXIT_FILE": str(Path("/nonexistent/exit"))})
