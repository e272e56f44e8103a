"""From a model folder to a loaded model with everything the engine must know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvfetcher.engines.hf.states import plan_states
from kvfetcher.errors import ConfigError, EngineError
from kvfetcher.models.geometry import cache_geometry
from kvfetcher.models.identity import rope_facts, rope_text, tokenizer_digest, weights_digest
from kvfetcher.models.limits import max_positions
from kvfetcher.models.tokenizer import check_tokenizer, end_token_ids
from kvfetcher.spec import KVDtype, KVSpec, ModelIdentity

if TYPE_CHECKING:
    from pathlib import Path

    from kvfetcher.engines.hf.states import StatePlan
    from kvfetcher.spec import RopeFacts


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
    part_dims: tuple[int, int]
    """Widths of the two tensors that a layer hands to its cache (`models.geometry`)."""
    states: StatePlan | None
    """What the model keeps beside K and V; None = nothing."""
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


def load_model(
    folder: Path, *, device: str, kv_dtype: KVDtype, chunk_tokens: int = 256
) -> LoadedModel:
    """Load a Hugging Face folder: float32 on CPU (bfloat16 is 2.5x slower there), bfloat16 on GPU.

    Args:
        folder: Hugging Face's.
        device: `engine.device`.
        kv_dtype: `engine.kv_dtype`.
        chunk_tokens: `codec.chunk_tokens`; chunks of models with states depend on it.

    Raises:
        ConfigError: the device is not there.
        EngineError: the folder cannot be loaded, or the model is of an unsupported kind.
    """
    chosen = choose_device(device)
    dtype = torch.float32 if chosen.type == "cpu" else torch.bfloat16
    transformers.utils.logging.disable_progress_bar()
    weights = weights_digest(folder)
    try:
        declared = AutoConfig.from_pretrained(folder, local_files_only=True)
        text = declared.get_text_config()
        cache_geometry(
            text, kv_dtype
        )  # what cannot be served is refused before its weights are read
        rope_text(text)
        attention = _attention_of(declared)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        check_tokenizer(tokenizer, folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as exc:
        raise EngineError(f"model folder {folder} cannot be loaded: {exc}") from exc
    if weights_digest(folder) != weights:
        raise EngineError(f"the model in {folder} changed while it was loaded; start again")
    model = model.eval().to(chosen)
    config = model.config
    geometry = cache_geometry(config, kv_dtype)
    states = None
    if geometry.linear_layers:
        states = plan_states(model, geometry, chunk_tokens=chunk_tokens)
    spec = states.spec if states else geometry.spec
    rope = rope_text(config)
    identity = ModelIdentity(
        weights=weights,
        tokenizer=tokenizer_digest(folder),
        lora="",
        rope=rope,
        compute=f"{str(dtype).removeprefix('torch.')} {attention}, KV rounded to nearest even"
        + (f", {states.identity}" if states else ""),
        spec=spec,
    )
    return LoadedModel(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        device=chosen,
        compute_dtype=dtype,
        spec=spec,
        part_dims=geometry.part_dims,
        states=states,
        identity=identity,
        rope=rope_facts(model, num_layers=spec.num_layers, head_dim=spec.head_dim),
        eos_ids=end_token_ids(
            getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id
        ),
        vocab_size=config.vocab_size,
        max_positions=max_positions(config),
    )


def _attention_of(config: Any) -> str:
    """Torch's fused attention where the model has it, else transformers' own (soft caps, sinks)."""
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        raise EngineError(f"model type {config.model_type!r} is not a decoder-only language model")
    model = known[type(config)]
    return "sdpa" if model._supports_sdpa else "eager"
