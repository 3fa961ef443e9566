"""Recipes: what trains the shipped model, and settings for larger ones. Scripts, not part of the package."""
