"""Benchmarks as the files that every stage reads: items, queries, relevance and training pairs.

`scenes` draws them, `karpathy` reads COCO and Flickr30K in Karpathy's splits, `mmeb` reads MMEB-train. Other benchmarks
of retrieval are modules that fulfil `contract` and stand in `registry`: `writing` checks what they have read and writes
it. `published` holds what papers report.
"""
