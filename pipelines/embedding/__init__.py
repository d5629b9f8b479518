"""The stages of offline embedding: prepare, encode, write, seal. `pipelines.embed` joins them on Ray Data."""
