"""vLLM's server, until our standard input ends: python vllm_launch.py FOLDER ARGUMENTS

Run by the interpreter that has vLLM, which has nothing of ours: the standard library only.
"""

import os
import runpy
import shutil
import signal
import sys
import threading


def _end_with_stdin(folder: str) -> None:
    """Whoever started us holds the other end: its end, however it comes, is that of our group,
    and of the folder that was made for us."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


# vLLM's processes import this file too, under another name.
if __name__ == "__main__":
    threading.Thread(target=_end_with_stdin, args=(sys.argv.pop(1),), daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
