"""Gorgon: Medusa heads trained, tuned, served and measured, with exactly the same answers."""
