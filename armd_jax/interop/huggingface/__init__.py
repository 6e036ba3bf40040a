"""Pretrained models of Hugging Face's formats: their configs, the names of their weights, and reading them."""
