"""Tasks: where samples come from, and what is right or wrong with them.

A new one implements `tasks.base.Task`, has a file of its own here, and gets its name in `tasks.catalog`.
"""
