"""``python -m bench.codes``: runs the study ``bench.studies.int8``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("bench.studies.int8", run_name="__main__", alter_sys=True)
