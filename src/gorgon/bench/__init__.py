"""Measures what Medusa heads gain: the same prompts, answered by several decoders in turn, and a report of it."""
