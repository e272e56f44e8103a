"""Runs a tritonserver with KVFetcher's models: the system's, or the nvidia-pytriton wheel's."""

from kvfetcher.launcher.process import TritonServer
from kvfetcher.launcher.supervise import Supervisor

__all__ = ["Supervisor", "TritonServer"]
