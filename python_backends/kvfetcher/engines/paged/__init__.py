"""The torch engine on paged KV memory, driven through TensorRT-LLM's KV-connector interface."""
