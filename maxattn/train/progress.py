"""Progress on a terminal; elsewhere, nothing but the lines that stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")
SILENT = Console(quiet=True)


class Bar:
    """A bar for work of `total` images: what is being done, whatever facts are set, images/s and the time left.

    `print` writes a line that stays above the bar, and is all that appears where the console is no terminal.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            _ImagesPerSecond(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, facts="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, images: int, **shown: Any) -> None:
        """Count images as done; `shown` may hold the `description` and the `facts` to show from now on."""
        self._progress.update(self._task, advance=images, **shown)

    def print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def track(items: Iterable[Item], description: str, total: int, console: Console) -> Iterator[Item]:
    """The items, with a bar while they come."""
    with Bar(console, total) as bar:
        bar.advance(0, description=description)
        for item in items:
            yield item
            bar.advance(1)


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")
