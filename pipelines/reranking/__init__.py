"""The stages of `slq rerank`; `pipelines.rerank` puts them together."""
