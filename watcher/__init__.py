"""The asyncio daemon: event sources, volume, triggers, partitions, configuration, command line."""

__version__ = "0.1.0"
