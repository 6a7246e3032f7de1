"""Comparisons: of layers, of models, of quality at equal time, with peers."""
