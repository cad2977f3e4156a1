"""Measure this host: loading, generation, serving and the cache, into one result that can be shown and compared."""
