"""Entry points: the `slq` command, its recipes, the demo and the report."""
