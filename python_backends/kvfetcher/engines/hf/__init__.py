"""The embedded engine: a Hugging Face model on a CPU or a GPU."""
