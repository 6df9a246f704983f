"""``python -m bench.release``: runs the study ``bench.studies.gradient_release``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("bench.studies.gradient_release", run_name="__main__", alter_sys=True)
