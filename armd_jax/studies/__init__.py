"""Sweeps: what their members are, what has been done of them, what they cost, and running what is left."""
