"""Reads `.npy` files, from whatever thread."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_parsing = threading.Lock()


def read_array(path: Path, *, mapped: bool = True) -> NDArray[Any]:
    """An array of a `.npy` file; nothing in it is ever executed.

    Args:
        path: The file.
        mapped: Whether its values stay on disk.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.
    """
    # numpy parses the header as Python, and parsers of Python 3.11 that run in two threads at once may fail.
    with _parsing:
        found: NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        return found
