"""What happened to one request's prefix, as the client sees it in `kv_report`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

Outcome = Literal["hit", "partial", "miss", "skipped"]

Reason = Literal[
    "",  # nothing to explain: every whole chunk of the prompt was hit
    "not_stored",  # the store has no (further) chunk of this prefix
    "short_prompt",  # no whole chunk before the last token
    "policy",  # kv_policy asked not to fetch
    "disabled",  # fetch.enabled is false
    "too_short",  # fewer tokens than fetch.min_hit_tokens
    "corrupt_chunk",  # set aside; see detail
    "identity_mismatch",  # the object is of another model, profile or prefix
    "store_error",
    "store_timeout",
    "decode_error",
    "arena_full",
    "deadline",
    "engine_error",
]


@dataclass(slots=True)
class FetchReport:
    """Facts of one fetch; times in milliseconds, sizes in bytes.

    `bytes_bf16` is what the hit's values would weigh uncompressed in bfloat16. `stages_ms` holds
    wall-clock times of the fetch (`lookup`, `total`) and times summed over units that ran side by
    side (`transfer`, `decode`, `restore`): these may add up to more than `total`.
    """

    policy: str
    prompt_tokens: int
    outcome: Outcome = "miss"
    reason: Reason = ""
    detail: str = ""
    hit_tokens: int = 0
    chunks_stored: int = 0
    chunks_hit: int = 0
    units: int = 0
    bytes_fetched: int = 0
    bytes_bf16: int = 0
    profile: str = ""
    decoders: dict[str, int] = field(default_factory=dict)
    stages_ms: dict[str, float] = field(default_factory=dict)

    def add_ms(self, stage: str, milliseconds: float) -> None:
        """Add time to a stage."""
        self.stages_ms[stage] = round(self.stages_ms.get(stage, 0.0) + milliseconds, 3)

    def give_up(self, reason: Reason, detail: str = "") -> None:
        """Say why the hit is shorter than it could be; the first reason stays."""
        if not self.reason:
            self.reason, self.detail = reason, detail

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))
