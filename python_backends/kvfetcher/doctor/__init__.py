"""`kvfetcher doctor`: what this machine has, whether it works, and what to do where it does not."""
