"""How chains run: many at a time, on buffers that stay where they are, captured as CUDA graphs on a GPU."""
