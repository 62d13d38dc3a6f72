"""Starts the programs as a user does, in processes that need not import torch anew: 0.3 s, not 5.

A server (multiprocessing's forkserver) imports preloaded.py and forks for each start; the script is
then read and run as by `python SCRIPT`, or, in several ranks, as torchrun would start them. Only
maskalign.py is not read again: its main() is there, and so are the images of its demo.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.run

import maskalign

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"  # where the server looks for it


def run_script(script, argv, shown, environment, before):
    """What the new process does; its stdout and stderr go to the two files `shown`."""
    for number, path in enumerate(shown, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    multiprocessing.set_start_method(None, force=True)  # data workers start as ever, not as we did
    os.environ.update(environment)
    if "RANK" in environment:
        torch.set_num_threads(1)  # as torchrun
    sys.argv = [script, *argv]
    if before:
        before()
    if script == maskalign.__file__:
        maskalign.main()
    else:
        runpy.run_path(script, run_name="__main__")


class Program:
    """A script of ours that runs; `before` is called in its process first, and must pickle."""

    def __init__(self, script, *argv, before=None, **environment):
        self.folder = tempfile.TemporaryDirectory()  # goes with this object
        self.shown = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        script, argv = str(ROOT / script), [str(x) for x in argv]
        args = (script, argv, self.shown, environment, before)
        self.process = SERVER.Process(target=run_script, args=args)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def runs(self):
        return self.process.is_alive()

    def end(self, timeout=200):
        """Waits; (exit status, stdout, stderr)."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise TimeoutError(f"it still ran after {timeout} s: {self.read()}")
        return self.process.exitcode, *self.read()

    def read(self):
        return [path.read_text() if path.exists() else "" for path in self.shown]


def torchrun(count, script, *argv):
    """`torchrun --standalone --nproc_per_node=COUNT SCRIPT`: its ranks are true new processes."""
    options = ("--standalone", f"--nproc_per_node={count}")
    return Program(torch.distributed.run.__file__, *options, ROOT / script, *argv)


def start_ranks(count, script, *argv, before=None, **options):
    """`torchrun --nproc_per_node=COUNT SCRIPT` without torchrun: a Program for each rank. `before`
    may be a list, of one function for each."""
    taken = socket.socket()  # kept as long as the ranks, so that no other program gets its port
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # but the first rank does
    taken.bind(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    one = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    one |= dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), **options)
    first = before if isinstance(before, list) else [before] * count
    ranks = [dict(one, RANK=str(i), LOCAL_RANK=str(i), before=first[i]) for i in range(count)]
    programs = [Program(script, *argv, **rank) for rank in ranks]
    for program in programs:
        program.taken = taken
    return programs
