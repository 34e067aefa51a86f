"""Made-up tokens of the forms that issuers print, assembled here so that no scanner takes this file for a leak."""

from __future__ import annotations

_LONG = "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5"

TOKENS = {
    "GitHub": "ghp" + "_" + _LONG,
    "GitHub, fine-grained": "github" + "_pat_" + _LONG[:22] + "_" + _LONG,
    "GitLab": "glpat" + "-" + _LONG[:20],
    "GitLab, deploy": "gldt" + "-" + _LONG[:20],
    "GitLab, runner": "glrt" + "-t1_" + _LONG[:20],
    "GitLab, CI job": "glcbt" + "-64_" + _LONG[:20],
    "Docker": "dckr" + "_pat_" + _LONG[:27],
    "npm": "npm" + "_" + _LONG,
    "PyPI": "pypi" + "-AgEIcHlwaS5vcmc" + _LONG,
    "Google": "ya29" + ".a0Af" + _LONG,
    "Azure": "AccountKey" + "=" + _LONG * 2 + "==",
    "Azure, signed": "https://x.blob.core.windows.net/a?sv=2024&sig" + "=" + _LONG + "%3D",
    "Slack, hook": "hooks.slack.com" + "/services/T0123ABCD/B0123ABCD/" + _LONG[:24],
    "age": "AGE-SECRET" + "-KEY-1" + _LONG.upper() + _LONG.upper()[:22],
    "header": "Authorization: " + "Bearer " + _LONG,
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
    "URL with a slash": "https://me:" + "hunter2/sec:ret" + "@example.org/x",
    "URL": "https://me:" + "hunter2secret" + "@example.org/x",
}
