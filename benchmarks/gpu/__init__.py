"""Everything that a machine with an NVIDIA GPU can say of the library, in one command and a given time.

    __main__.py       the command line (benchmarks/gpu.sh is its front)
    run.py            the steps, in order of value, each with its share of the time
    children.py       a child process: its budget, its end, what it printed
    units.py          many small measurements in worker processes that may hang or crash
    rows.py           what is measured, in which order
    targets.py        what is to be reached, GPU by GPU
    document.py       the JSON of a run: its form, and what follows from its figures
    table.py          that, as text and as the README's Markdown

In the child processes, which are the only ones that import torch:

    environment.py    the machine and the versions
    worker.py         runs units, one line of JSON each
    smoke.py          each operator against float64
    measure.py        one row: time on the device, time of the caller, memory
    workloads.py      the rows' tensors and calls
    outcomes.py       a pytest plugin: one line of JSON a test
"""
