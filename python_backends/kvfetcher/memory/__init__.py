"""The arena of KV blocks, who holds them, and how other processes reach them."""
