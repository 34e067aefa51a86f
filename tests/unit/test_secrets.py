"""What looks like a secret, and what does not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from secret_shapes import TOKENS

from ecdit_train.errors import ConfigError, Problem
from ecdit_train.observe.redact import redact_text
from ecdit_train.secrets import REDACTED, form_of, hide_forms, in_file, is_secret_name

ROOT = Path(__file__).parents[2]
INNOCENT = (
    *(
        "a photo of a red circle",
        "runs/ask-the-expert-with-long-hyphens",
        "sk-learn-something-else-entirely",
        "hf_cache",
    ),
    *(
        "registry.example.org#ecdit/train:0.1.0",
        "docker://nvcr.io/nvidia/pytorch:25.01-py3",
        "s3://bucket/a@b",
        "a:b@c",
    ),
    "image@sha256:" + "0123456789abcdef" * 4,
    "/cache/models--t5/snapshots/" + "0123456789abcdef" * 2 + "01234567",
    "https://github.com/x/y/commit/" + "0123456789abcdef" * 2 + "01234567",
    "repo:" + "0123456789abcdef" * 2 + "01234567",
    "https://me@example.org/x",
    "docker://registry.example.org:5000/ecdit/train@sha256:" + "0123456789abcdef" * 4,
    "http://[::1]:8080/a@b",
    "a bearer of good news at 10 o'clock",
    "sig=12, a signature of twelve",
    "npm_config_cache",
    "https://hooks.slack.com/services",
    "https://${USER}:${PASSWORD}@example.org",
)


@pytest.mark.parametrize("shape", TOKENS)
def test_a_token_is_known_by_its_form(shape):
    token = TOKENS[shape]
    for text in (token, f"NAME={token}", f'"{token}"', f"as {token}, they say"):
        assert form_of(text) is not None, text
        secret = token.partition("me:")[2].partition("@")[0] or token
        assert secret not in hide_forms(text)
        assert REDACTED in redact_text(text)


@pytest.mark.parametrize("text", INNOCENT)
def test_ordinary_values_are_not(text):
    assert form_of(text) is None
    assert hide_forms(text) == text


def test_files_are_searched_by_line_and_may_name_commits():
    commit = TOKENS["W&B"]
    assert in_file(f"# since commit {commit}\nREVISION = '{commit}'\n") is None
    assert in_file(f"a = 1\nWANDB_KEY = '{commit}'\n") == (2, "a W&B key")
    assert in_file(f"\n\n# {TOKENS['Hugging Face']}\n") == (3, "a Hugging Face token")


def test_nothing_of_ours_looks_like_one():
    """A snapshot would be refused; and documentation is copied from."""
    names = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    texts = {
        n: (ROOT / n).read_text(errors="replace") for n in names if n and (ROOT / n).is_file() and n[:5] != "tests"
    }
    assert {n: found for n, text in texts.items() if (found := in_file(text))} == {}


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "MY_PW", "PAT", "GH_PAT", "DB_PWD",
                                  "HTTP_AUTH", "AWS_SECRET_ACCESS_KEY", "APIKEYS", "SSHPASS", "MY_CREDS", "COOKIE",
                                  "SESSION_COOKIES", "PASSKEY"])  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM",
        "PATH",
        "PWD",
        "OLDPWD",
        "NCCL_IB_HCA",
        "AUTHOR",
        "COMPASS",
        "PATTERN",
        "MONKEY",
        "TURKEYS",
        "BYPASS",
        "ACCRED",
    ],
)
def test_names_that_only_look_alike(name):
    assert not is_secret_name(name)


def test_a_problem_never_shows_one():
    """Typed under a wrong key, for instance."""
    token = TOKENS["GitHub"]
    error = ConfigError(Problem(field="train.steps", value=token, rule=f"not {token}", nearest=token))
    assert token not in str(error)
    assert str(error).count(REDACTED) == 3
