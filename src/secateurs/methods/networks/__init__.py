"""Protocols and baselines that act on whole networks."""
