"""Plugins of every kind, good and bad, as real distributions that pip installs.

Plugin `name` is the module `name_mod` of the distribution `name-dist` 1.2: MODULE and then the code given here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from wheels import pip_install, write_wheel

MODULE = """
import torch
from maxattn import Backend, Capabilities, max_sa
from maxattn.hookspecs import hookimpl

class Own(Backend):
    name = "{plugin}"

    def attend(self, qkv, bias, problem):
        return max_sa(qkv, problem.axis, problem.window, bias, backend="naive")

def fail(*arguments):
    raise LookupError("asked and failed")

"""

HOOK = """
@hookimpl
def maxattn_backends():
    return [Own()]
"""

FINE = {
    "fine": HOOK,
    "newer_minor": "Own.api_version = (1, 7)\n" + HOOK,
    "asks_while_it_is_loaded": "import maxattn\nmaxattn.list_backends()\n" + HOOK,
    "prints": "print('I am imported')\n" + HOOK.replace("return", "print('I am asked'); return"),
    "raises_in_kernel": "Own.kernel = fail\n" + HOOK,
    "leaves_in_kernel": "def leave(*_):\n    raise SystemExit('I leave')\nOwn.kernel = leave\n" + HOOK,
    "slow": "import time\ntime.sleep(1.2)\n" + HOOK,
}

# The code of each plugin that fails while it is loaded, with a part of the failure reported.
BROKEN = {
    "without_the_hook": ("", "hook maxattn_backends is missing; it must return a list of backends"),
    "forgets_to_return": (
        "@hookimpl\ndef maxattn_backends():\n    [Own()]\n",
        "hook maxattn_backends returned None; it must return a list of backends",
    ),
    "import_error": ("import a_library_that_is_missing\n", "No module named 'a_library_that_is_missing'"),
    "crash": ("1 / 0\n", "ZeroDivisionError: division by zero"),
    "exit": ("raise SystemExit('I leave')\n", "SystemExit: I leave"),
    "panic": ("class Panic(BaseException):\n    pass\nraise Panic('an extension')\n", "Panic: an extension"),
    "many_lines": ("raise RuntimeError('one\\n  two\\n')\n", "RuntimeError: one two"),
    "silent": ("raise NotImplementedError\n", "NotImplementedError"),
    "unreadable": ("class Mute(Exception):\n    __str__ = fail\nraise Mute\n", "Mute: <exception str() failed>"),
    "syntax_error": ("def\n", "SyntaxError: invalid syntax"),
    "crash_in_hook": ("@hookimpl\ndef maxattn_backends():\n    1 / 0\n", "ZeroDivisionError: division by zero"),
    "no_list": (HOOK.replace("[Own()]", "Own()"), "'Own' object is not iterable"),
    "a_class": (
        HOOK.replace("Own()", "Own"),
        "a backend must be an instance: Own(), not the class",
    ),
    "a_string": (HOOK.replace("Own()", "'naive'"), "a backend must be an instance of maxattn.Backend, not 'naive'"),
    "abstract": ("del Own.attend\nOwn.__abstractmethods__ = frozenset({'attend'})\n" + HOOK, "abstract"),
    "unnamed": ("del Own.name\n" + HOOK, "a backend's name must be an identifier, not None"),
    "misnamed": ("Own.name = 'my-own'\n" + HOOK, "a backend's name must be an identifier, not 'my-own'"),
    "capabilities": (
        "Own.capabilities = {'bias': True}\n" + HOOK,
        "backend 'capabilities': capabilities must be maxattn.Capabilities, not {'bias': True}",
    ),
    "capabilities_raise": ("Own.capabilities = property(fail)\n" + HOOK, "LookupError: asked and failed"),
    "list_of_dtypes": (
        "Own.capabilities = Capabilities(dtypes=[torch.float32])\n" + HOOK,
        "dtypes of Capabilities must be a frozenset, not [torch.float32]",
    ),
    "device_as_text": (
        "Own.capabilities = Capabilities(devices='cpu')\n" + HOOK,
        "devices of Capabilities must be a frozenset, not 'cpu'",
    ),
    "empty_range": (
        "Own.capabilities = Capabilities(head_dims=(33, 63), head_dim_multiple=64)\n" + HOOK,
        "head_dims of Capabilities must be (low, high), 1 <= low <= high with a multiple of 64 between them",
    ),
    "too_new": (
        "Own.api_version = (2, 0)\n" + HOOK,
        "backend 'too_new' is written for plugin API 2.0, this maxattn has 1.0",
    ),
    "kwargs_of_hook": (
        "@hookimpl\ndef maxattn_backends(**options):\n    return [Own()]\n",
        "hook maxattn_backends takes **options: name the arguments it uses instead",
    ),
    "kwargs_of_attend": (
        "Own.attend = lambda self, qkv, bias, problem, **kwargs: qkv[:, :, :, 2]\n" + HOOK,
        "backend 'kwargs_of_attend': attend takes **kwargs; its arguments are qkv, bias, problem",
    ),
    "unknown_argument": ("@hookimpl\ndef maxattn_backends(device):\n    return [Own()]\n", "Argument(s) {'device'}"),
    "unknown_hook": (HOOK + "@hookimpl\ndef maxattn_nonsense():\n    return []\n", "unknown hook 'maxattn_nonsense'"),
    "unmarked": (
        "def maxattn_backends():\n    return [Own()]\n",
        "hook maxattn_backends is not marked: put @maxattn.hookspecs.hookimpl above it",
    ),
    "same_name_twice": (HOOK.replace("Own()", "Own(), Own()"), "'same_name_twice' is given twice by the same plugin"),
    "takes_naive": (
        "Own.name = 'naive'\n" + HOOK,
        "backend 'naive' is provided by two distributions, maxattn and takes-naive-dist: uninstall one",
    ),
    "takes_fine": (
        "Own.name = 'fine'\n" + HOOK,
        "backend 'fine' is provided by two distributions, fine-dist and takes-fine-dist: uninstall one",
    ),
}

# Plugins that load, with a backend that raises, or leaves the program, when asked whether it can serve, or how fast.
RAISING = {
    "raises_in_unsupported": "Own.unsupported = fail\n" + HOOK,
    "leaves_in_unsupported": "def leave(*_, **__):\n    raise SystemExit('I leave')\nOwn.unsupported = leave\n" + HOOK,
    "panics_in_unsupported": (
        "class Panic(BaseException):\n    __str__ = fail\n"
        "def panic(*_, **__):\n    raise Panic\nOwn.unsupported = panic\n" + HOOK
    ),
    "raises_in_relative_speed": "Own.relative_speed = fail\n" + HOOK,
    "raises_in_capabilities": "class Facts(Capabilities):\n    unsupported = fail\nOwn.capabilities = Facts()\n" + HOOK,
}


FAILURES = {
    "leaves_in_unsupported": "SystemExit: I leave",
    "panics_in_unsupported": "Panic: <exception str() failed>",
}
"""What is told of those of RAISING that do not raise LookupError."""


def distribution_of(plugin: str) -> str:
    return f"{plugin}-dist".replace("_", "-")


def install(site: Path, plugins: Iterable[tuple[str, str]]) -> None:
    """Install a distribution for each plugin and its code into the folder `site`."""
    with TemporaryDirectory() as folder:
        wheels = [
            write_wheel(
                Path(folder),
                distribution_of(plugin),
                {f"{plugin}_mod.py": MODULE.format(plugin=plugin) + code},
                {plugin: f"{plugin}_mod"},
            )
            for plugin, code in plugins
        ]
        pip_install(site, *wheels)


def install_all(site: Path) -> None:
    """Install every plugin of this file."""
    broken = {plugin: code for plugin, (code, _) in BROKEN.items()}
    install(site, (FINE | broken | RAISING).items())
