"""Text to tokens to packed rows to batches."""
