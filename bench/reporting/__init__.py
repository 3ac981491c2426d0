"""The tables and pictures of bench/report.py."""
