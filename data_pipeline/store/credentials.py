"""Credentials of s3-compatible stores: from the environment, which obstore reads itself, or from the files of the AWS
tools, which it does not. Never from a configuration: that is printed, stored with checkpoints and sent to trackers."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def s3_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What is to be added to the environment's own: of the profile in `~/.aws/credentials` and `~/.aws/config`, where the
    environment names no key; region and endpoint where it names none."""
    if environment.get("AWS_SKIP_SIGNATURE", "").lower() == "true":
        return {}
    home, profile = Path("~/.aws").expanduser(), environment.get("AWS_PROFILE", "default")
    files = configparser.RawConfigParser()
    try:
        files.read(environment.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"), encoding="utf-8")
        told = dict(files.items(profile)) if files.has_section(profile) else {}
        files = configparser.RawConfigParser()
        files.read(environment.get("AWS_CONFIG_FILE", home / "config"), encoding="utf-8")
        for section in (profile, f"profile {profile}"):
            told |= dict(files.items(section)) if files.has_section(section) else {}
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}
    found: dict[str, str] = {}
    if "AWS_ACCESS_KEY_ID" not in environment:
        found |= {key.removeprefix("aws_"): told[key] for key in _KEYS if key in told}
    if not environment.get("AWS_REGION") and not environment.get("AWS_DEFAULT_REGION") and "region" in told:
        found["region"] = told["region"]
    if not any(environment.get(key) for key in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3")):
        found |= {"endpoint": told["endpoint_url"]} if "endpoint_url" in told else {}
    return found
