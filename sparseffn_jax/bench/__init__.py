"""Comparisons of layers and models on the clock, and of quality at equal time, with peers."""
