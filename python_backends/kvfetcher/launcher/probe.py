"""Sends one tiny unit through kv_pipeline and compares what comes back, byte for byte.

The unit (probe.kvu) is of profile `exact`: 192 tokens of fp8 with 32 channels, one 192x144 picture,
wide enough for NVDEC.
"""

from __future__ import annotations

import hashlib
import http.client
import json
from importlib import resources
from typing import TYPE_CHECKING

from kvfetcher import wire

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_ANSWER = "no answer"
"""How the reason begins where nothing came back in time."""

VALUES_SHA256 = "e1960ed3d24a1aa3ca08a3982af4af5f240799901ae199cb054a821ced491d78"

_REASON_CHARACTERS = 300


def probe_unit() -> bytes:
    """The unit's bytes."""
    return (resources.files("kvfetcher.launcher") / "probe.kvu").read_bytes()


def probe_pipeline(
    host: str,
    http_port: int,
    *,
    timeout_seconds: float,
    headers: Mapping[str, str] | None = None,
) -> str:
    """Why kv_pipeline does not do its work now; empty = it does.

    Args:
        host: where tritonserver answers HTTP.
        http_port: its port.
        timeout_seconds: longest wait for the answer.
        headers: what a server with restricted APIs asks for.
    """
    unit = probe_unit()
    body = {
        "inputs": [
            {
                "name": wire.UNIT,
                "shape": [1, len(unit)],
                "datatype": "UINT8",
                "data": list(unit),
            }
        ],
        "outputs": [{"name": wire.KV_VALUES}],
    }
    connection = http.client.HTTPConnection(host, http_port, timeout=timeout_seconds)
    try:
        connection.request(
            "POST", f"/v2/models/{wire.KV_PIPELINE}/infer", json.dumps(body), dict(headers or {})
        )
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            return text.decode(errors="replace")[:_REASON_CHARACTERS]
        values = bytes(json.loads(text)["outputs"][0]["data"])
    except (OSError, http.client.HTTPException) as exc:
        return f"{NO_ANSWER} ({exc or type(exc).__name__})"
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        return f"an answer that is not Triton's ({type(exc).__name__}: {exc})"
    finally:
        connection.close()
    if hashlib.sha256(values).hexdigest() != VALUES_SHA256:
        return "the values that came back differ from those that were stored"
    return ""
