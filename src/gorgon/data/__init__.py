"""Rows from the hub, from files or from the embedded generator, as chat examples in disjoint splits."""
