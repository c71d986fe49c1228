"""Disks: formatting and adopting, the system file, snapshots, scans, retention. May import `comparer`."""
