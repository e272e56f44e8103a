"""Every byte that is stored: container, units, pictures, keys and digests (docs/format.md)."""
