"""What the benchmarks share: time of candidates in turn, peak memory, fresh processes, tables, metadata, JSON files."""

import argparse
import ctypes
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from pml_ext.strict_json import strict_json

START_METHOD = "spawn"  # of processes


class Measured(NamedTuple):
    """The seconds of each step, and the peak of memory in MB above what was there before."""

    seconds: list[float]
    peak_mb: float


def time_in_turn(candidates, repeats, device="cpu", number=1, before=None, clock=None):
    """Return name -> seconds of each repeat, the first of which is a warm-up and not counted.

    Candidates take turns, so that a change of the machine's speed meets all. A repeat is ``number`` calls, and its
    seconds are those of one. ``before`` is called ahead of each repeat and not timed. ``clock``: ``time.process_time``
    counts what this process computes, on a machine that others compute on too. None: time as it passes.
    """
    clock = clock or time.perf_counter
    seconds = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, call in candidates.items():
            if before is not None:
                before()
            wait_for(device)
            start = clock()
            for _ in range(number):
                call()
            wait_for(device)
            if repeat:
                seconds[name].append((clock() - start) / number)
    return seconds


def wait_for(device):
    if device != "cpu":
        torch.cuda.synchronize()


def start_peak(device="cpu"):
    """Let the peak of memory begin here; return what is taken now, in MB. On a CPU for Linux with glibc only."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_since(start, device="cpu"):
    """Return the peak in MB above what ``start_peak`` has returned."""
    return (_resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20) - start


def _resident(field):
    """Return VmRSS or VmHWM (its peak) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def measure_steps(step, steps, device="cpu"):
    """Return the seconds of each step and their peak of memory, with that of the warm-up."""
    start = start_peak(device)
    seconds = time_in_turn({"step": step}, steps, device)["step"]
    return Measured(seconds, peak_since(start, device))


def measure_in_turn(measure, jobs, rounds, *common):
    """Return job -> all seconds and the median peak of ``measure(*job, *common)``, each in a process of its own."""
    measured = {job: [] for job in jobs}
    for job in tqdm(jobs * rounds, desc="measurements", file=sys.stderr):
        measured[job].append(in_fresh_process(measure, *job, *common))
    return {
        job: Measured([s for one in all_ for s in one.seconds], statistics.median(one.peak_mb for one in all_))
        for job, all_ in measured.items()
    }


def in_fresh_process(function, *arguments):
    """Return what a function of a module returns in a new process, whose memory is that of this call."""
    with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as pool:
        return pool.submit(function, *arguments).result()


def in_processes(function, jobs, processes, describe=lambda result: ""):
    """Yield the results as they come, each of a process of its own, and show how far it is."""
    context = multiprocessing.get_context(START_METHOD)
    with (
        context.Pool(processes, initializer=quiet, maxtasksperchild=1) as pool,
        tqdm(total=len(jobs), unit="run") as bar,
    ):
        for result in pool.imap_unordered(function, jobs, chunksize=1):
            yield result
            bar.set_postfix_str(describe(result))
            bar.update()


def quiet():
    """Keep the progress bars of a worker from the screen, and end with the process that asked for it."""
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(process):
    process.join()
    os._exit(1)


def median_and_quartiles(values, digits, factor=1.0):
    """Return the median and [lower, upper] quartile, multiplied and rounded."""
    low, median, high = (round(factor * value, digits) for value in statistics.quantiles(values, n=4))
    return median, [low, high]


def median_ratio(seconds, others):
    """Return the median of the ratios of repeats that lie side by side."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def metadata(device="cpu", threads=None, **sizes):
    """Return versions, machine, device, threads, and the sizes of a benchmark."""
    return {
        "torch": torch.__version__,
        "pytorch-metric-learning": version("pytorch-metric-learning"),
        "machine": platform.machine(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": threads or torch.get_num_threads(),
        **sizes,
    }


def save(out, kept):
    """Write what was measured as JSON where a file is asked for, and return it."""
    if out is not None:
        Path(out).write_text(strict_json(kept, indent=1) + "\n")
    return kept


def markdown_table(titles, lines, numbers=0):
    """Return a table that Markdown and people can read; the last ``numbers`` columns are aligned to the right."""
    widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]
    left = len(titles) - numbers
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in [titles, rule, *lines]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in aligned)


def make_parser(doc, *options):
    """Return a parser of the command line with the options ``--device`` and ``--out`` where they are asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {"--device": {"default": "cpu"}, "--out": {"default": None, "help": "JSON file"}}
    for option in options:
        parser.add_argument(option, **known[option])
    return parser
