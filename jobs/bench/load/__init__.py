"""Loads on an HTTP service: requests that come when they come, sent by a process of its own that imports little."""
