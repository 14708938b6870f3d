"""Shared pieces of the tests. Imports run down: no helper knows conftest or a test.

Whoever imports a helper has no Hub from then on, unless the environment says so: before transformers is imported.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: a thread each, also for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
