"""Numbers that exist already: read, compared, explained and shown."""
