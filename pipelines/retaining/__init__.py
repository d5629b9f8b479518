"""Parts of `pipelines.retention`: its settings, the work of its tasks, and what is made of their answers."""
