"""Ahead-of-time compilation for TPU pods on a machine without one."""
