"""Trains the shipped `tiny` backbone from scratch: no retrieval loss, only captions, questions and match prompts."""
