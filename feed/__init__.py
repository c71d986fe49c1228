"""The wire: message schema, publisher, commands, and the consumer's side. May import `comparer`."""
