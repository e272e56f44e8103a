"""A stand-in for Triton's `triton_python_backend_utils`, for tests of the adapters' code.

Only what the package uses. What Triton does beyond that is tested with the real server.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError(Exception):
    INVALID_ARG, NOT_FOUND, UNAVAILABLE, UNSUPPORTED, INTERNAL, CANCELLED = range(6)

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code

    def message(self):
        return str(self)


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def has_error(self):
        return self.error is not None

    def __getitem__(self, name):
        return get_output_tensor_by_name(self, name).as_numpy()


class ResponseSender:
    """Keeps what is sent."""

    def __init__(self):
        self.responses = []
        self.is_final = threading.Event()

    def send(self, response, flags=0):
        self.responses.append(response)
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.is_final.set()


class Anything:
    """Holds every name."""

    def __contains__(self, name):
        return True


@dataclass
class Request:
    tensors: dict[str, Any]
    cancelled: bool = False
    sender: ResponseSender = field(default_factory=ResponseSender)
    parameters_json: str = "{}"
    wanted: list[str] = field(default_factory=list)
    """Outputs asked for; none = all."""

    def get_response_sender(self):
        return self.sender

    def is_cancelled(self):
        return self.cancelled

    def request_id(self):
        return "request"

    def parameters(self):
        return self.parameters_json

    def requested_output_names(self):
        return self.wanted or Anything()


@dataclass
class Metric:
    """One series: what it holds now."""

    value: float = 0.0
    observed: list[float] = field(default_factory=list)

    def increment(self, by):
        self.value += by

    def set(self, value):
        self.value = value

    def observe(self, value):
        self.observed.append(value)


class MetricFamily:
    """Series by their labels."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, *, name, description, kind):
        assert description
        self.name, self.kind, self.series = name, kind, {}

    def Metric(self, *, labels, **_):
        return self.series.setdefault(tuple(sorted(labels.items())), Metric())


def get_input_tensor_by_name(request, name):
    array = request.tensors.get(name)
    return None if array is None else Tensor(name, array)


def get_output_tensor_by_name(response, name):
    return next((t for t in response.output_tensors if t.name() == name), None)
