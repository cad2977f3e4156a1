"""Cache tarballs: the format, writing and reading them, and the stores in which they live."""
