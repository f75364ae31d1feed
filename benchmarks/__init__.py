"""Every provider of a kernel family timed side by side, in one process, on the shapes of real models.

    python -m benchmarks [family] [--quick] [--out DIR]    time, print tables, append records
    python -m benchmarks --device cpu --out benchmarks/results    the CPU's records, of all families
    python -m benchmarks.report --images                   write tables and pictures from the records
    python -m benchmarks.tune FAMILY FUNCTION              search the values near those of a config.py
    pytest benchmarks --benchmark-only                     host overhead of one call

Map:
    family.py        what a family hands over: problems, inputs, providers, the work of each
    shapes.py        layers of real models, with where the numbers come from
    <family>.py      one family; found by its FAMILY
    timing.py        interleaved rounds, CUDA graph replay, quantiles
    memory.py        peak memory of one call
    roofline.py      measured ceilings, and the time they leave to a problem
    record.py        one line of results/<device>/<family>.jsonl, and its check
    environment.py   device, versions, commit, hash of the sources
    sample.py        a few problems that say within minutes how the kernels stand
    harness.py       one problem: check, time, weigh, record
    tables.py        comparisons between the providers of one problem; Markdown
    report.py        README.md's parts and docs/benchmarks.md
    gpus.py          which GPUs are on record
    aot.py           compile for a GPU that is not there, and read the machine code
    candidates.py    what else a config could be
    tune.py          which candidates fit (no GPU needed), and which is fastest
    pictures.py      docs/images: time, roofline and memory of each problem
"""
