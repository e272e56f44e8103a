"""`kvfetcher chaos`: faults on a real server, and what each of them may not do."""
