"""Held-out likelihoods, reports and plots."""
