"""Measuring the layers of real networks: what `python -m fastsep bench` and `replay` run."""
