"""Builds a knowledge-aware benchmark out of captioned images: `slq karr`.

Its parts: `source` plans the captions, `neighbours` embeds their images, `rows` makes the rows of a shard and
`shards` its files, with what `models` loads: a rewriter (`endpoint` is one behind HTTP, `kept` its answers on disk),
`judges` and who is `identifying`. `outcome` reads what people say (`review`) and tells what came of it, `export` writes
the benchmark, `identity` says what all of it depends on, and `build` is the flow.

The flow is on Ray Data with one row per shard, as that of `slq rerank` is. What Ray Data buys here is a pool of actors
that hold their models, restarts of those that die, and back-pressure; what it does not give, exactly-once output, is
the commit ledger's, as everywhere in this repository.
"""
