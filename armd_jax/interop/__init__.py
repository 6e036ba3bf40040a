"""Checkpoints in and out: runs and safetensors exports."""
