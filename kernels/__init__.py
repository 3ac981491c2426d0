"""The operations of the engine's step, one file each: the formula, the shapes and the torch twin.

They know tensors only, nothing of models or policies. An operation writes into the buffers that it is given.
"""
