"""``python -m bench.roundings``: runs the study ``bench.studies.roundings``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("bench.studies.roundings", run_name="__main__", alter_sys=True)
