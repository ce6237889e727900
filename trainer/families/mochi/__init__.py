"""Mochi 1, text to video."""
