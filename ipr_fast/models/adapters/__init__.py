"""Models of other libraries as denoisers."""
