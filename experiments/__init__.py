"""Kernels of `lateral_connection` that do not serve, and the command that times them: `python -m experiments`."""
