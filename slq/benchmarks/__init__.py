"""Benchmarks as the files that every stage reads: items, queries, relevance and training pairs.

`scenes` draws them, `karpathy` reads COCO and Flickr30K in Karpathy's splits, `mmeb` reads MMEB-train; `tables` writes.
"""
