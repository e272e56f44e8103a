"""The fetcher: which chunks to get, in which order, and getting them."""
