"""Probes of a running deployment and the verdicts drawn from them."""
