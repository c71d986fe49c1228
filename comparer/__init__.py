"""Pure comparison: metadata of two states in, ordered changes out. No I/O, no clock, imports nothing of ours."""
