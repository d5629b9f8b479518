"""Benchmarks: ratios, both sides interleaved in one run, printed as JSON.

They need only torch and transformers beside `slq`, so the same command runs on a bare GPU machine:
`python -m jobs.bench train`.
"""
