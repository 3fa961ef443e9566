"""Families of models, one row each: how to recognise a checkpoint, and what its config and weights are called.

A new family whose layers transformers has is a row here, with a test against its original.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffucoder.errors import CheckpointError
from diffucoder.files import Json
from diffucoder.model_files import shown


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one family have in common."""

    model_type: str  # in their config.json
    architecture: str  # the model type of transformers whose layers these are
    shifted: bool = True  # row i - 1 of the model scores token i
    diffusion: bool = False  # they are denoisers, so they need a mask id
    mask_id: int | None = None  # if their config names none
    config_names: Mapping[str, str] = field(default_factory=dict)  # their keys -> transformers' keys
    weight_names: Mapping[str, str] = field(default_factory=dict)  # regular expression of theirs -> transformers' name

    def weight_name(self, stored: str) -> str:
        """The name that transformers has for a stored weight."""
        for pattern, name in self.weight_names.items():
            stored = re.sub(pattern, name, stored)
        return stored


FAMILIES = (
    Family("Dream", "qwen2", diffusion=True),  # Dream, Dream-Coder, DiffuCoder: Qwen2 that attends both ways
    Family("qwen2", "qwen2"),
    Family("qwen3", "qwen3"),
    Family("llama", "llama"),
)


def family_of(fields: Json, folder: Path) -> Family:
    """The family of the checkpoint that a config.json describes. CheckpointError if there is none."""
    model_type = fields.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise CheckpointError(f"{folder}/config.json: model_type {shown(model_type)} is not supported; use one of {known}")
