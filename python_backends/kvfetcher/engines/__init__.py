"""LLM engines: `base` says what one is, `host` opens the configured one."""
