"""Recipes, run folders that resume, the benchmark matrix."""
