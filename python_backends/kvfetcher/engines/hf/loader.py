"""From a model folder to a loaded model with everything the engine must know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvfetcher.errors import ConfigError, EngineError
from kvfetcher.models.identity import rope_facts, rope_text, tokenizer_digest, weights_digest
from kvfetcher.models.limits import max_positions
from kvfetcher.models.tokenizer import check_tokenizer, end_token_ids
from kvfetcher.spec import KVDtype, KVSpec, ModelIdentity

if TYPE_CHECKING:
    from pathlib import Path

    from kvfetcher.spec import RopeFacts

_ATTENTION = "sdpa"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory."""

    folder: Path
    model: Any
    """transformers' AutoModelForCausalLM, in eval mode on `device`."""
    tokenizer: Any
    device: torch.device
    compute_dtype: torch.dtype
    spec: KVSpec
    identity: ModelIdentity
    rope: RopeFacts
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_positions: int


def choose_device(text: str) -> torch.device:
    """Parse engine.device: auto = the first CUDA GPU where there is one, else the CPU.

    Raises:
        ConfigError: not a device, or not on this machine.
    """
    if text == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as exc:
        raise ConfigError(f"engine.device must be auto, cpu or cuda[:N], got {text!r}") from exc
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device must be auto, cpu or cuda[:N], got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"engine.device = {text!r}, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def load_model(folder: Path, *, device: str, kv_dtype: KVDtype) -> LoadedModel:
    """Load a Hugging Face folder: float32 on CPU (bfloat16 is 2.5x slower there), bfloat16 on GPU.

    Raises:
        ConfigError: the device is not there.
        EngineError: the folder cannot be loaded, or the model is of an unsupported kind.
    """
    chosen = choose_device(device)
    dtype = torch.float32 if chosen.type == "cpu" else torch.bfloat16
    transformers.utils.logging.disable_progress_bar()
    weights = weights_digest(folder)
    try:
        _refuse_unsupported(AutoConfig.from_pretrained(folder, local_files_only=True))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        check_tokenizer(tokenizer, folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as exc:
        raise EngineError(f"model folder {folder} cannot be loaded: {exc}") from exc
    if weights_digest(folder) != weights:
        raise EngineError(f"the model in {folder} changed while it was loaded; start again")
    model = model.eval().to(chosen)
    config = model.config
    heads = config.num_attention_heads
    spec = KVSpec(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=kv_dtype,
    )
    rope = rope_text(config)
    identity = ModelIdentity(
        weights=weights,
        tokenizer=tokenizer_digest(folder),
        lora="",
        rope=rope,
        compute=f"{str(dtype).removeprefix('torch.')} {_ATTENTION}, KV rounded to nearest even",
        spec=spec,
    )
    return LoadedModel(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        device=chosen,
        compute_dtype=dtype,
        spec=spec,
        identity=identity,
        rope=rope_facts(model, num_layers=spec.num_layers, head_dim=spec.head_dim),
        eos_ids=end_token_ids(
            getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id
        ),
        vocab_size=config.vocab_size,
        max_positions=max_positions(config),
    )


def _refuse_unsupported(config: Any) -> None:
    """Raise EngineError where one cache of all tokens in all layers would be wrong.

    Sliding-window layers are fine: the cache keeps every token and the mask hides the old ones.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise EngineError(
            f"model type {config.model_type!r} has layers of kinds {sorted(kinds)}; the torch"
            " engine serves softmax attention only (full, or with a sliding window)"
        )
    if config.is_encoder_decoder or not hasattr(config, "num_attention_heads"):
        raise EngineError(f"model type {config.model_type!r} is not a decoder-only language model")
