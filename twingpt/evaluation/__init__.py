"""Evaluation: held-out loss, and the n-gram baselines to compare it with."""
