"""Restarts: a pool of seeds is trained for a short while, judged on held-out text, and the best one goes on."""

from hasten.restarts.running import RestartResult, restart

__all__ = ["RestartResult", "restart"]
