"""Benchmarks: ratios, both sides interleaved in one run, and runs under faults; printed as JSON.

`train` needs torch, transformers and Pillow, but no Ray, faiss, DeepSpeed, pyarrow, pydantic or typer, so the same
command runs on a bare GPU machine: `python -m jobs.bench train --full`.
"""
