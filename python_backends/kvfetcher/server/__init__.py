"""Runs a tritonserver with KVFetcher's models: the system's, or the nvidia-pytriton wheel's."""

from kvfetcher.server.process import TritonServer
from kvfetcher.server.supervise import Supervisor

__all__ = ["Supervisor", "TritonServer"]
