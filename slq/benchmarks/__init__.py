"""Benchmarks: items, queries and relevance in the form that every stage reads."""
