"""Commands for operators of a store: list, check, warm, purge and collect."""
