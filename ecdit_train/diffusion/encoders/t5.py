"""T5 encoders from a local folder. The only importer of transformers.

Legend: B captions, L text tokens, X feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import TextEncoderConfig
from ecdit_train.errors import EncoderError

from .local_folder import load_frozen, local_folder


@dataclass(frozen=True, kw_only=True)
class T5(TextEncoderConfig):
    """Any transformers T5 encoder with its tokenizer, from one local folder."""

    path: str
    """Folder with config.json, safetensors weights and a tokenizer."""
    width: int
    """Channels of the encoder's output; must equal d_model of its config.json."""
    max_tokens: int
    """Tokens per caption; longer captions are cut."""
    parameters: int
    """Frozen parameters, for the plan's totals (the paper counts 670M)."""

    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def num_parameters(self) -> int:
        return self.parameters

    def feature_bytes(self, *, encoder_bytes: int) -> int:
        return encoder_bytes

    def flops_per_image(self) -> float:
        """2 FLOPs per parameter and token."""
        return 2.0 * self.parameters * self.max_tokens

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.at_least(0, [f"{key}.parameters"])
        rule = "must be a local folder with config.json and safetensors weights"
        check.require(bool(self.path.strip()), f"{key}.path", rule=rule, nearest="encoders/t5")

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> T5TextEncoder:
        return T5TextEncoder(self, device=device, dtype=dtype)


_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


class T5TextEncoder:
    """Any transformers T5 encoder with its tokenizer, from one local folder."""

    def __init__(self, config: T5, *, device: torch.device | str, dtype: torch.dtype) -> None:
        folder = local_folder(config.path, what="encoders.text.path")
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            # transformers would make one with an empty vocabulary, and every word would be the same.
            names = ", ".join(_TOKENIZER_FILES)
            raise EncoderError(f"encoders.text.path: {config.path!r} does not hold a tokenizer (looked for {names})")
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as e:
            raise EncoderError(f"encoders.text.path: {config.path!r} does not hold a tokenizer: {e}") from e
        self._model = load_frozen(
            T5EncoderModel.from_pretrained, folder, what="encoders.text.path", kind="a T5 encoder", dtype=dtype
        )
        self._model.to(device)
        self.width, self.max_tokens, self.device = int(self._model.config.d_model), config.max_tokens, device
        if self.width != config.width:
            raise EncoderError(
                f"encoders.text.width = {config.width}: the encoder in {config.path!r} is {self.width} wide; "
                f"nearest valid: {self.width}"
            )

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        features = self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return features, tokens.attention_mask.bool()
