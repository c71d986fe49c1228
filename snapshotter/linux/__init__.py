"""One file per kernel interface; only these (and watcher's sources) import ctypes or fcntl."""
