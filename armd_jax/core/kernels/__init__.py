"""Code that computes one operation well: attention, matrix products, the embedding lookup."""
