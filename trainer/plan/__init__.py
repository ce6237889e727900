"""Predictions: memory, time and cost of a run, and advice where it does not fit."""
