"""TensorRT-LLM's side of the KV connector, to be run without TensorRT-LLM; see docs/tensorrt_llm.md.

The loop, the interface and the pool are those of the paged engine (`kvfetcher.engines.paged`). Added here:
several ranks, memory that is scribbled over as soon as it is free, idle iterations that show old metadata
again, replay of requests, and schedules with what must hold for each of them.
"""
