"""Watch a directory with a Python library, plainly, as its own first example does: watch.py LIBRARY DIRECTORY.

Prints `ready`; collects the paths of files (whose names begin with f) that it is told of, and prints how many they are when it
gets SIGTERM.
"""

import os
import signal
import sys
import threading

seen: set[str] = set()
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())


def note(path: str) -> None:
    if os.path.basename(path).startswith("f"):
        seen.add(path)


def ready() -> None:
    print("ready", flush=True)


def watchfiles(top: str) -> None:
    from watchfiles import watch

    threading.Timer(1.0, ready).start()  # its watch begins with the first step of the generator
    for changes in watch(top, stop_event=ended, raise_interrupt=False):
        for _, path in changes:
            note(path)


def watchdog(top: str) -> None:
    from watchdog.events import FileSystemEvent, FileSystemEventHandler
    from watchdog.observers import Observer

    class Handler(FileSystemEventHandler):
        def on_any_event(self, event: FileSystemEvent) -> None:
            note(os.fsdecode(event.src_path))

    observer = Observer()
    observer.schedule(Handler(), top, recursive=True)
    observer.start()
    ready()
    ended.wait()


def pyinotify(top: str) -> None:
    import pyinotify as library

    class Handler(library.ProcessEvent):
        def process_default(self, event) -> None:
            note(event.pathname)

    manager = library.WatchManager()
    notifier = library.ThreadedNotifier(manager, Handler())
    notifier.daemon = True
    notifier.start()
    wanted = library.IN_CREATE | library.IN_MODIFY | library.IN_CLOSE_WRITE | library.IN_DELETE | library.IN_MOVED_TO
    manager.add_watch(top, wanted, rec=True, auto_add=True)
    ready()
    ended.wait()


if __name__ == "__main__":
    sys.path.pop(0)  # this directory
    {"watchfiles": watchfiles, "watchdog": watchdog, "pyinotify": pyinotify}[sys.argv[1]](sys.argv[2])
    print(len(seen), flush=True)
    os._exit(0)
