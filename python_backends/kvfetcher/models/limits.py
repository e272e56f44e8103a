"""How long a prompt may be, as a model's configuration says."""

from __future__ import annotations

from typing import Any


def max_positions(config: Any) -> int:
    """Positions that a model can tell apart.

    With YaRN they are the original positions times the factor: `max_position_embeddings` keeps
    the original number in some configurations (Qwen) and the stretched one in others (DeepSeek).

    Args:
        config: transformers' configuration (the text model's).

    Raises:
        AttributeError, TypeError, ValueError: it does not say.
    """
    declared = int(config.max_position_embeddings)
    parameters = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    kinds = list(parameters.values())
    if not kinds or not all(isinstance(kind, dict) for kind in kinds):
        kinds = [parameters]
    stretched = [
        int(kind["original_max_position_embeddings"] * kind["factor"])
        for kind in kinds
        if kind.get("rope_type", kind.get("type")) == "yarn"
        and kind.get("original_max_position_embeddings")
        and kind.get("factor")
    ]
    return min(stretched) if stretched else declared
