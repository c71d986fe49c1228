"""The asyncio daemon: event sources, volume, triggers, partitions, configuration, command line."""
