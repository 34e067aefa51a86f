"""Frozen models from a local folder: safetensors only, whole or not at all, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecdit_train.errors import EncoderError


def local_folder(path: str | None, *, what: str) -> Path:
    """The folder, or EncoderError when it, its config.json or its safetensors weights are missing."""
    if not path or not Path(path).is_dir():
        raise EncoderError(
            f"{what}: {path!r} is not a local folder; download the model there first (nothing is fetched at run time)"
        )
    if not (Path(path) / "config.json").is_file():
        raise EncoderError(f"{what}: no config.json in {path!r}")
    if not any(Path(path).glob("*.safetensors")):
        raise EncoderError(
            f"{what}: no safetensors weights in {path!r} (looked for *.safetensors); pickle files are refused"
        )
    return Path(path)


def load_frozen(loader: Callable[..., Any], folder: Path, *, what: str, kind: str, **options: Any) -> Any:
    """A frozen model, whole. Both libraries fill tensors that a file lacks with random values and
    a warning; we refuse."""
    from safetensors import SafetensorError

    try:
        model, info = loader(folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise EncoderError(f"{what}: {str(folder)!r} does not hold {kind}: {e}") from e
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise EncoderError(
            f"{what}: {str(folder)!r} does not hold {kind}: it lacks {len(missing)} of its tensors ({missing[0]})"
        )
    return model.eval().requires_grad_(False)
