"""The operations of the engine's step, one file each: the formula, the shapes, the code.

They know tensors only, nothing of models or policies, and write into the buffers that they are given. What stands here
runs on any device in torch; a fused Triton kernel is to stand beside each, and what is here will be its twin, the
version that it is tested against.
"""
