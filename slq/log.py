"""Logging set-up; only `jobs` calls `configure`, libraries just use `logging.getLogger(__name__)`."""

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure(level: int = logging.INFO) -> None:
    """Send slq's, the pipelines' and the jobs' records to standard error; leave other libraries at warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    for name in ("slq", "pipelines", "jobs"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
