"""Measures sample quality before and after refinement."""
