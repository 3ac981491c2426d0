"""The operations of the engine and its models, one file each: the formula, the shapes, the kernel, its torch twin.

They know tensors only, nothing of models or policies, and write into the buffers that they are given. `launch.py` says
when an operation runs as its Triton kernel and when as its twin, the version that the kernel is tested against.
"""
