"""Likelihoods of held-out text, samples with their speed, and the results of both."""
