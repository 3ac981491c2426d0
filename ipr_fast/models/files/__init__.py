"""Find, read and write models' files."""
