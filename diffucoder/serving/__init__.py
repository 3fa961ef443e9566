"""Serving: an engine that decodes many requests at once, behind the protocols that tools speak."""
