"""Benchmarks: ratios, both sides interleaved in one run, printed as JSON.

They need torch, transformers and what the core of `slq` imports (Pillow, pyarrow), but no Ray, faiss, DeepSpeed,
typer or pydantic, so the same command runs on a bare GPU machine: `python -m jobs.bench train --full`.
"""
