"""Training a transformer of patches or tokens for a task."""
