"""Measurements that ship with the package: `kvfetcher bench ...`."""
