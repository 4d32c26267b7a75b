"""Measurements: stability, connectivity, plasticity, the PQ index."""
