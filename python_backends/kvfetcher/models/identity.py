"""Whose KV values these are: digests of weights and tokenizer, and the RoPE of a loaded model.

What the identity covers, and why it is enough: KV values are a function of the tokens before them,
the weights, the model's configuration (both in ``weights``), the position encoding (``rope``) and
the arithmetic (``compute``: compute dtype, attention kernel family, how values become KV dtype).
Left out on purpose: slice size, thread count, batch neighbours, device model and library versions.
They change the order of additions, that is the last bits before rounding, as they do between two
runs of one server; chunks made under them are as right as each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import time
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import EngineError
from kvfetcher.spec import RopeFacts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIGEST_FILE = ".kvfetcher-digest.json"
_HASH_STEP = 1 << 24
_SETTLED_SECONDS = 2.0  # file systems mark times as coarsely as that
_MAX_SAFETENSORS_HEADER = 100_000_000  # the limit of the format's own reader

# Fields of config.json that do not touch the arithmetic but differ between savers.
_VOLATILE = (
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
)

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# These choose frequencies by the total length, so that the K of a prefix would depend on what
# follows it: such values must not be shared.
_CHANGING_ROPE_TYPES = ("dynamic", "longrope")


def weights_digest(folder: Path) -> str:
    """SHA-256, hex, over the model's tensors and its configuration.

    Tensors are hashed by name, dtype, shape and bytes in the order of their names, so that the
    digest does not depend on how they are spread over files. 500 MB take about a second; the
    result is kept in the folder (where that is writable) and found again while no file changed.
    Sizes and times of modification do not tell that: `cp -p`, `tar` and `rsync -t` set them. So the
    kernel's own marks count, too (inode, time of change), and a file changed a moment ago is
    hashed again, because the next change may get the same time.

    Raises:
        EngineError: no or damaged safetensors files, or they change meanwhile.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineError(
            f"model folder {folder} has no *.safetensors file; convert the model (in transformers:"
            " save_pretrained) and try again"
        )
    state = _file_states(folder, files)
    kept = folder / DIGEST_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        data = json.loads(kept.read_text())
        if data["files"] == state and len(data["sha256"]) == 64:
            return str(data["sha256"])
    digest = hashlib.sha256(_configuration(folder).encode())
    tensors = sorted(
        (name, path, info) for path in files for name, info in _safetensors_index(path).items()
    )
    for name, path, (dtype, shape, start, end) in tensors:
        digest.update(f"\n{name} {dtype} {shape} {end - start}\n".encode())
        for part in _file_parts(path, start, end):
            digest.update(part)
    if _file_states(folder, files) != state:
        raise EngineError(f"the model in {folder} changed while it was read; try again")
    newest = max(int(times[-1]) for times in state)
    if time.time_ns() - newest > _SETTLED_SECONDS * 1e9:
        partial = kept.with_name(f"{DIGEST_FILE}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a read-only folder is hashed each time
            partial.write_text(json.dumps({"files": state, "sha256": digest.hexdigest()}))
            partial.replace(kept)
    return digest.hexdigest()


def _file_states(folder: Path, files: list[Path]) -> list[list[str | int]]:
    """Name, size, times and inode of each file that the digest covers."""
    states: list[list[str | int]] = []
    for path in (*files, folder / "config.json"):
        try:
            status = path.stat()
        except OSError as exc:
            raise EngineError(f"model file {path} cannot be read: {exc.strerror}") from exc
        states.append(
            [
                path.name,
                status.st_size,
                status.st_mtime_ns,
                status.st_dev,
                status.st_ino,
                status.st_ctime_ns,
            ]
        )
    return states


def tokenizer_digest(folder: Path) -> str:
    """SHA-256, hex, over the file that defines the token ids.

    Raises:
        EngineError: there is none.
    """
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        path = folder / name
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    raise EngineError(f"model folder {folder} has no tokenizer.json, tokenizer.model or vocab.json")


def rope_text(config: Any) -> str:
    """Canonical text of a transformers configuration's position encoding.

    Raises:
        EngineError: a kind whose K values depend on later tokens, or none that is known.
    """
    parameters = getattr(config, "rope_parameters", None) or _older_rope_parameters(config)
    if not parameters:
        raise EngineError(
            f"model type {config.model_type!r} declares no rope_parameters; only models with rotary"
            " position encoding are supported"
        )
    refuse_changing_rope(config)
    for kind in _rope_types(parameters):
        if kind not in _ROPE_TYPES:
            raise EngineError(f"rope_type {kind!r} is unknown; supported are {_ROPE_TYPES}")
    return json.dumps(parameters, sort_keys=True, separators=(",", ":"), default=str)


def refuse_changing_rope(config: Any) -> None:
    """Refuse a model whose keys depend on the tokens after them.

    Args:
        config: transformers' configuration.

    Raises:
        EngineError: its rotation depends on the total length.
    """
    parameters = getattr(config, "rope_parameters", None) or _older_rope_parameters(config)
    for kind in _rope_types(parameters):
        if kind in _CHANGING_ROPE_TYPES:
            raise EngineError(
                f"rope_type {kind!r} makes K depend on the total length, so prefixes cannot be"
                f" shared; supported are {_ROPE_TYPES}"
            )


def _rope_types(parameters: dict[str, Any]) -> list[str]:
    """RoPE types of every kind of layer."""
    nested = all(isinstance(value, dict) for value in parameters.values())
    return [p["rope_type"] for p in (parameters.values() if nested else [parameters])]


def config_rope_facts(config: Any, *, num_layers: int, head_dim: int) -> RopeFacts:
    """`rope_facts` from a configuration alone: no weights are read or made.

    Raises:
        EngineError: the model keeps its frequencies where this build does not look.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    return rope_facts(model, num_layers=num_layers, head_dim=head_dim)


def rope_facts(model: Any, *, num_layers: int, head_dim: int) -> RopeFacts:
    """Inverse frequencies of every layer, read from a loaded model.

    A latent cache (MLA) has none, nor has one with states: no profile undoes their rotation.

    Raises:
        EngineError: the model keeps them where this build does not look.
    """
    kinds = getattr(model.config, "layer_types", None) or ()
    if getattr(model.config, "kv_lora_rank", None) or "linear_attention" in kinds:
        return RopeFacts(((),) * num_layers, (1.0,) * num_layers)
    rotary: Any = getattr(getattr(model, "model", None), "rotary_emb", None)
    kinds = getattr(model.config, "layer_types", None) or [""] * num_layers
    rows, scalings = [], []
    for layer, kind in enumerate(kinds):
        # Models with one base per kind of layer (Gemma 3) prefix the names with the kind.
        own = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        inv_freq = getattr(rotary, f"{own}inv_freq", None)
        if inv_freq is None:
            raise EngineError(
                f"{type(model).__name__} has no model.rotary_emb.inv_freq; only models built like"
                " Llama, Qwen, Mistral and Gemma 3 are supported"
            )
        row = inv_freq.tolist() if _rotates(model.config, layer, kind) else []
        if 2 * len(row) > head_dim:
            raise EngineError(f"layer {layer} rotates {2 * len(row)} of {head_dim} dims")
        rows.append(tuple(float(value) for value in row))
        scalings.append(float(getattr(rotary, f"{own}attention_scaling")))
    return RopeFacts(tuple(rows), tuple(scalings))


def _rotates(config: Any, layer: int, kind: str) -> bool:
    """Whether a layer is rotated at all; transformers has no one way to say so."""
    flags = getattr(config, "no_rope_layers", None)  # 1 = rotated (SmolLM3, Llama 4)
    if flags:
        return bool(flags[layer])
    if config.model_type in ("cohere2", "exaone4") and getattr(config, "sliding_window", None):
        return kind == "sliding_attention"
    return True


def _older_rope_parameters(config: Any) -> dict[str, Any]:
    """What transformers 4 keeps in two fields, in the form of transformers 5."""
    theta = getattr(config, "rope_theta", None)
    if theta is None:
        return {}
    scaling = dict(getattr(config, "rope_scaling", None) or {})
    kind = scaling.pop("type", None)
    return {
        "rope_theta": theta,
        "rope_type": scaling.pop("rope_type", kind or "default"),
        **scaling,
    }


def _configuration(folder: Path) -> str:
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise EngineError(f"model configuration {path} cannot be read: {exc}") from exc
    kept = {key: value for key, value in data.items() if key not in _VOLATILE}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def _safetensors_index(path: Path) -> dict[str, tuple[str, str, int, int]]:
    """Name -> dtype, shape, first byte, end byte (of the file)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_SAFETENSORS_HEADER:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        size = path.stat().st_size
        index = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + int(offset) for offset in info["data_offsets"])
            if not 8 + length <= start <= end <= size:
                raise ValueError(f"tensor {name} ends at {end} of {size} bytes")
            index[name] = (str(info["dtype"]), str(info["shape"]), start, end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(f"weights file {path} is damaged: {exc}; get the model again") from exc
    return index


def _file_parts(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        for offset in range(start, end, _HASH_STEP):
            yield memory[offset : min(offset + _HASH_STEP, end)]
