"""OpenAI's HTTP API in front of a running server: what clients that exist already speak."""

from kvfetcher.openai.app import make_app
from kvfetcher.openai.thread import OpenAIServer

__all__ = ["OpenAIServer", "make_app"]
