"""What the fine stage is made of; `slq.reranker` puts it together."""
