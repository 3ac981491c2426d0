"""Models on disk: where their files are, what is read from them, and how they are written."""
