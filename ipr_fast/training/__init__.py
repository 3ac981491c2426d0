"""Training a PatchTransformer of a task."""
