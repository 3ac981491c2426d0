"""Tasks: sources of training samples, with judges of finished ones; README.md says how to add one."""
