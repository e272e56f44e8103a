"""KVFetcher: remote prefix KV caches as lossless H.265 video, on NVIDIA Triton.

Importing this package imports nothing heavy; every submodule names what it needs.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
