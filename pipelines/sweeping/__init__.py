"""The parts of `slq sweep`: vectors, cells, the fine stage, and the table."""
