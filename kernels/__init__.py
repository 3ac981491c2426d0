"""The operations of the engine and its models, one file each: formula, shapes, Triton kernel, launcher, torch twin.

They take tensors, not models or policies. `launch.py` decides whether an operation runs as its kernel or as its twin,
which the kernel is tested against.
"""
