"""Made-up tokens of the forms that issuers print, assembled here so that no scanner takes this file for a leak."""

from __future__ import annotations

_LONG = "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5"

TOKENS = {
    "GitHub": "ghp" + "_" + _LONG,
    "GitHub, fine-grained": "github" + "_pat_" + _LONG[:22] + "_" + _LONG,
    "GitLab": "glpat" + "-" + _LONG[:20],
    "Hugging Face": "hf" + "_" + _LONG,
    "OpenAI": "sk" + "-" + _LONG,
    "OpenAI project": "sk" + "-proj-" + _LONG,
    "Anthropic": "sk" + "-ant-api03-" + _LONG,
    "NVIDIA": "nvapi" + "-" + _LONG,
    "W&B": "0123456789abcdef" * 2 + "01234567",
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "Slack": "xoxb" + "-123456789012-abcdefghij",
    "JWT": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0." + _LONG,
    "private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "URL": "https://me:" + "hunter2secret" + "@example.org/x",
}
