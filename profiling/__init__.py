"""Measures everything below it: kernels, memory, throughput and accuracy."""
