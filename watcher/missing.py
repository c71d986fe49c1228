"""What is said when a Python package that snapfeed needs is not there. Imports nothing that could be missing itself."""

import sys

_PACKAGES = {"paho": "paho-mqtt", "asyncore": "pyasyncore"}  # module: package, where they have different names
_OURS = frozenset({"comparer", "feed", "snapshotter", "watcher"})


def explained(error: ModuleNotFoundError) -> str:
    """Which package, for which Python, and how to install it. Raises the error again if it is no package of others."""
    module = (error.name or "").partition(".")[0]
    if not module or module in _OURS or module in sys.stdlib_module_names - _PACKAGES.keys():
        raise error
    package = _PACKAGES.get(module, module)
    return (
        f"snapfeed: the Python package {package} is missing for {sys.executable}; install what snapfeed needs with"
        f" `{sys.executable} -m pip install -r requirements/run.txt` and snapfeed itself with `... install --no-deps .`"
        " in its source tree (docs/install.md), or run the `snapfeed` of the environment where that was done"
    )
