"""The KV connector: what runs inside the LLM engine's worker processes, and its link to the arena's owner."""
