"""Speed and memory of everything that has a bar: one command measures, another writes the page.

    python -m benchmarks.speed run                          # all of it: hours on two cores; a GPU too, where there is one
    python -m benchmarks.speed run --only fisher startup    # a part
    python -m benchmarks.speed run --quick                  # does it all run? tiny shapes, nothing is kept
    python -m benchmarks.speed report                       # docs/speed.md, from the records in benchmarks/speed/history

Each measurement runs in a process of its own; one that fails is recorded with its reason and the others go on. What is
compared is interleaved: in every repetition each case runs once, in a shuffled order. A figure is a median with the 95 %
bootstrap interval of that median; a ratio is the median of the ratios of the same repetition. Peak memory is that of one
more process for each case. `registry` lists what is measured, in which units, and with which bars.
"""
