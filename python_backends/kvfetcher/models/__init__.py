"""Model folders, tokenizers, and the identity of a loaded model."""
