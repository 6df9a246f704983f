"""Benchmarks, pre-training runs and machine-code reports; not part of the installed package."""

import atexit
import gc

atexit.register(gc.freeze)  # the end of a process would search all imports for garbage, for up to a second
