"""The KV codec: profiles, units, lossless H.265 video."""
