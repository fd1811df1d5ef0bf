"""Benchmarks: `python -m bench.<name>`. Each ends with one JSON document and keeps its rows in bench/results/."""
