"""zops: take a bare GPU host to a serving one, keep its model cache honest and its containers healthy."""

__version__ = "0.1.0"
