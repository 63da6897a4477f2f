"""The gateway as it is, with what bench_log.py needs to see inside of it. Takes its arguments.

LUTHIER_BENCH_PROFILE: file for the statistics of cProfile.
LUTHIER_BENCH_TTL_S: how long a delivered outcome is kept, so that a short run sees them expire.
"""

import cProfile
import os
import sys

from luthier_core import oplog
from luthier_gateway.__main__ import main

if __name__ == "__main__":
    if ttl_s := os.environ.get("LUTHIER_BENCH_TTL_S"):
        oplog.DELIVERED_TTL_MS = int(1000 * float(ttl_s))
    if file := os.environ.get("LUTHIER_BENCH_PROFILE"):
        profiler = cProfile.Profile()
        code = profiler.runcall(main)
        profiler.dump_stats(file)
        sys.exit(code)
    sys.exit(main())
