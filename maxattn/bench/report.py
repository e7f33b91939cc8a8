"""The pages of `docs/benchmarks`: every table and plot of them is made here, from the results in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from maxattn.bench import plots, tables
from maxattn.bench.results import Kind, Result
from maxattn.weights.files import replacing

RESULTS = "results"
MARK = "<!-- Written by 'maxattn bench report' from the files in results/. -->"
NOT_CHECKED = "**Not checked in the same run.**"
INDEX = "README.md"
TITLES: dict[str, str] = {
    "op": "Max-SA, one call",
    "model": "Networks, inference",
    "train": "Networks, a training step",
    "scaling": "Cost against pixels",
    "dispatch": "The cost of choosing a backend",
}
ABOUT: dict[str, str] = {
    "op": (
        "Max-SA by every backend that can serve it, on the shapes of MaxViT's stages, head dim 32, with a bias in fp32 "
        "or without one. *Floor* is the time to move what must be moved at the rate of a large copy, measured in the "
        "same run: 4 B H W C elements forward, 12 in training. *Copy* is a copy of as many bytes as the forward pass "
        "moves; where those fit into a processor's cache, it is below the floor. Training is forward and backward with "
        "all gradients. On a GPU calls are replayed from a CUDA graph with a cold cache, but for *training without a "
        "graph*; on a CPU they are warm."
    ),
    "model": (
        "The logits of a batch that is there already. *Plain* is what `maxattn.build` makes, *optimized* what "
        "`maxattn.optimize_for_inference` makes of it. Others are timm's and torchvision's same network, in both "
        "memory layouts. torchvision's `maxvit_t` differs from the published MaxViT-T in details. Compiled networks "
        "are compiled for one batch, on a CPU with frozen weights, on a GPU as a CUDA graph; *first call* is mostly "
        "the compiler. Memory is what a warm call takes at once beyond weights and images, and what a CUDA graph of "
        "the call keeps; `torch.compile`'s graphs share that, so only the first one's is told. A table tells what "
        "each kind of layer of the optimized network must move and compute, if each of its kernels on a GPU reads and "
        "writes once. The floor is the time to compute that at the rate of a large "
        "product of matrices, or, where that takes longer, to move it at the rate of a large copy, both measured in "
        "the same run; on a CPU, whose caches hold what lies between layers, to compute it. *Measured* is the time "
        "from the end of an operator to that of the next, by the GPU's own clock, without a CUDA graph."
    ),
    "train": (
        "Forward, backward and fused AdamW on a batch that is there already, without dropout and stochastic depth. "
        "Weights are in fp32; bfloat16 is that of autocast. *Checkpointed*, each block keeps its input alone and is "
        "computed again going backward; *selective*, only norms, activations and gates are. Memory is what a warm step "
        "takes at once, with weights, gradients and the optimizer's state. *Recorded* is compiled and replayed as CUDA "
        "graphs, as `maxattn train` does it on a GPU. Those share their memory, so only the first one's is told."
    ),
    "scaling": (
        "The logits of growing images by the network made for inference, its windows of one size throughout; and by "
        "the same network whose windows are the whole feature map, without position bias. On a GPU they are replayed "
        "as a CUDA graph, whose memory counts. Where a size is missing, a call would have taken too long, or more than "
        "half of the free memory."
    ),
    "dispatch": (
        "`max_sa` with a backend that does nothing, less a direct call of that backend. Compiled, the choice is made "
        "while tracing; what remains are guards, which a compiled function checks once a call, however many layers "
        "it holds."
    ),
}
CHECKS: dict[str, str] = {
    "op": "every backend against the specification in fp64, within the kit's error budget",
    "model": (
        "the logits of a batch's first and last image against ours with the same weights in fp64, but for "
        "architectures that are noted"
    ),
    "train": (
        "the loss of the first step and the norm of its gradient against ours with the same weights in the next finer "
        "dtype"
    ),
    "scaling": "the logits of the smallest image against the plain networks' in fp64",
}
"""What is checked before anything is timed."""
FOR_ALL = (
    "Times are medians, beside them the quartiles; in a table of many candidates, half the distance of these in per "
    "cent. Candidates of a case take turns in one process, a sample each, so "
    "that what disturbs the machine disturbs them all; a note says where it was otherwise. `maxattn bench report` "
    "writes these pages from the files in [`results/`](results/), one for each machine and kind; nobody edits them "
    "by hand."
)
AGAIN = """\
    make bench                                          # all, for this machine: the GPU if there is one
    maxattn bench model maxvit_tiny_tf_224 --batch 8 --out docs/benchmarks
    maxattn bench report docs/benchmarks                # the pages alone, from the JSON"""
ADVICE = (
    "`maxattn bench --help` names the measurements, and the help of each its options. A result replaces the older "
    "one of the same machine and kind; those of other machines stay. Every backend that is installed is measured: "
    "`make bench` installs `triton` and `flex` for a GPU, others are to be added by hand. Measure on a machine that "
    "does nothing else. Threads are those of `OMP_NUM_THREADS`. On Linux, PyTorch on a CPU takes large tensors from "
    "the system anew each time, which favours whoever allocates less; the variables of the C library that change "
    "this are in the stamp."
)


def read(folder: Path) -> list[Result]:
    """The results below `folder`, by kind and machine.

    Raises:
        ValueError: for a JSON file there that holds none.
    """
    found = [Result.read(path) for path in sorted((folder / RESULTS).glob("*.json"))]
    order = list(get_args(Kind))
    return sorted(found, key=lambda result: (order.index(result.kind), result.machine.name, not result.finished))


def ready(folder: Path) -> None:
    """Whether results can be written into `folder`, and all pages be made of them: to be asked before measuring.

    Raises:
        FileExistsError: for a file in the place of a page that was not written here.
        ValueError: for a JSON file that holds no result.
        ModuleNotFoundError: without matplotlib.
    """
    plots.matplotlib()
    _refuse_others([folder / INDEX, *_pages(folder), *(_plot(folder, result) for result in read(folder))])


def write(folder: Path) -> list[Path]:
    """Write the index, a page for each kind and the plots, from the results below `folder`; returns what was written.

    Plots and pages that were written here and whose results are no longer there are removed. Other files stay.

    Raises:
        FileExistsError: for a file in the place of a page that was not written here; before anything is written.
        ValueError: for a JSON file that holds no result.
        ModuleNotFoundError: without matplotlib.
    """
    results = read(folder)
    if not results:
        return []
    ready(folder)
    written = []
    plotted: dict[str, Path] = {}
    for result in results:
        path = _plot(folder, result)
        if plots.draw(result, path):
            plotted[result.file_name] = path
            written.append(path)
    for kind in dict.fromkeys(result.kind for result in results):
        sections = [_section(result, plotted.get(result.file_name)) for result in results if result.kind == kind]
        written.append(_write(folder / f"{kind}.md", [f"# {TITLES[kind]}", ABOUT[kind], FOR_ALL, *sections]))
    written.append(_write(folder / INDEX, _index(results)))
    for path in {*folder.glob("*.svg"), *_pages(folder)} - set(written):
        if _written_here(path):
            path.unlink()
    return written


def _pages(folder: Path) -> list[Path]:
    return [folder / f"{kind}.md" for kind in get_args(Kind)]


def _plot(folder: Path, result: Result) -> Path:
    return folder / Path(result.file_name).with_suffix(".svg")


def _refuse_others(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists() and not _written_here(path):
            raise FileExistsError(f"{path} was not written by 'maxattn bench': move it, or give another folder")


def _written_here(path: Path) -> bool:
    """By how a file begins: a page with a comment, a plot with who made it."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        begin = file.read(2000)
    return begin.startswith(MARK) if path.suffix == ".md" else f">{plots.CREATOR}<" in begin


def _section(result: Result, plot: Path | None) -> str:
    chip = result.machine.gpu or f"{result.machine.cpu}, {result.machine.cores} cores"
    told = [] if result.finished else ["**Not finished:** the run ended before all of its cases were measured."]
    if result.kind in CHECKS:
        told += [f"Checked before, in the same run: {CHECKS[result.kind]}." if result.checked else NOT_CHECKED]
    picture = [f"![{TITLES[result.kind]} on {chip}]({plot.name})"] if plot else []
    settings = [f"{name} {_plain(value)}" for name, value in result.settings.items()]
    stamp = f"{result.machine}{'; ' if settings else ''}{', '.join(settings)}. File: "
    link = f"[`{result.file_name}`]({RESULTS}/{result.file_name})"
    title = f"## {chip}{'' if result.finished else ', not finished'}"
    return "\n\n".join([title, stamp + link, *told, *picture, tables.OF_KIND[result.kind](result)])


def _index(results: list[Result]) -> list[str]:
    rows = [
        (
            f"[{TITLES[result.kind]}]({result.kind}.md){'' if result.finished else ', not finished'}",
            result.machine.gpu or f"{result.machine.cpu}, {result.machine.cores} cores",
            f"torch {result.machine.torch}",
            result.machine.date.partition("T")[0] or "not dated",
            f"[JSON]({RESULTS}/{result.file_name})",
        )
        for result in results
    ]
    return [
        "# Benchmarks",
        FOR_ALL,
        tables.table(("what", "machine", "version", "date", "numbers"), rows, right=0),
        "## Again, or elsewhere",
        AGAIN,
        ADVICE,
    ]


def _plain(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, parts: list[str]) -> Path:
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join([MARK, *parts]) + "\n", encoding="utf-8")
    return path
