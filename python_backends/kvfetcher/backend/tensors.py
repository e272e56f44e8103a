"""Request tensors <-> Python values, by name, with errors that name the tensor.

Input tensors die when `execute` returns (and sooner in decoupled models), so every reader here
returns a copy or a Python value, but for the two that say otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_text(request: Any, name: str, pb_utils: Any, *, default: str | None = None) -> str:
    """A STRING tensor's only element; `default` where the tensor is absent."""
    values = read_texts(request, name, pb_utils)
    if values is None:
        if default is None:
            raise RequestError(f"input {name!r} is missing")
        return default
    if len(values) != 1:
        raise RequestError(f"input {name!r} must hold one string, got {len(values)}")
    return values[0]


def read_texts(request: Any, name: str, pb_utils: Any) -> list[str] | None:
    """A STRING tensor's elements, or None where the tensor is absent."""
    array = _array(request, name, pb_utils)
    if array is None:
        return None
    try:
        return [v.decode() if isinstance(v, bytes) else str(v) for v in array.reshape(-1)]
    except UnicodeDecodeError as exc:
        raise RequestError(f"input {name!r} is not UTF-8 (byte {exc.start})") from exc


def read_scalar(request: Any, name: str, pb_utils: Any) -> Any:
    """A numeric or BOOL tensor's only element as a Python value, or None where absent."""
    array = _array(request, name, pb_utils)
    if array is None:
        return None
    if array.size != 1:
        raise RequestError(f"input {name!r} must hold one value, got shape {list(array.shape)}")
    return array.reshape(-1)[0].item()


def read_ids(request: Any, name: str, pb_utils: Any) -> NDArray[np.int32]:
    """An INT32 tensor, flattened; a copy."""
    array = _array(request, name, pb_utils)
    if array is None:
        raise RequestError(f"input {name!r} is missing")
    return array.reshape(-1).astype(np.int32, copy=True)


def read_bytes(request: Any, name: str, pb_utils: Any) -> bytes:
    """A UINT8 tensor's bytes; empty where the tensor is absent."""
    array = _array(request, name, pb_utils)
    return b"" if array is None else array.tobytes()


def read_view(request: Any, name: str, pb_utils: Any) -> memoryview:
    """A UINT8 tensor's bytes without a copy, valid only while the request is being executed."""
    array = read_array(request, name, pb_utils)
    return np.ascontiguousarray(array).reshape(-1).data


def read_array(request: Any, name: str, pb_utils: Any) -> NDArray[Any]:
    """A tensor as it is, valid only while the request is being executed."""
    array = _array(request, name, pb_utils)
    if array is None:
        raise RequestError(f"input {name!r} is missing")
    return array


def text_tensor(name: str, value: str | list[str], pb_utils: Any, *, batched: bool = False) -> Any:
    """STRING tensor [n], or [1, n] for a model with a batch dimension."""
    values = [value] if isinstance(value, str) else value
    array = np.array([v.encode() for v in values], dtype=np.object_)
    return pb_utils.Tensor(name, array[None] if batched else array)


def bytes_tensor(
    name: str, value: bytes | memoryview, pb_utils: Any, *, batched: bool = False
) -> Any:
    """UINT8 tensor [n], or [1, n] for a model with a batch dimension."""
    array = np.frombuffer(value, dtype=np.uint8)
    return pb_utils.Tensor(name, array[None] if batched else array)


def ids_tensor(name: str, ids: NDArray[np.int32] | tuple[int, ...], pb_utils: Any) -> Any:
    """INT32 tensor [n]."""
    return pb_utils.Tensor(name, np.asarray(ids, dtype=np.int32))


def count_tensor(name: str, count: int, pb_utils: Any) -> Any:
    """UINT32 tensor [1]."""
    return pb_utils.Tensor(name, np.array([count], dtype=np.uint32))


def _array(request: Any, name: str, pb_utils: Any) -> NDArray[Any] | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
