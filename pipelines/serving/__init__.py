"""What runs in the replicas of the online service; `pipelines.serve` starts and stops it."""
