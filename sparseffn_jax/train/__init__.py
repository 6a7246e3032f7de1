"""Data, losses, recipes and the loop that fine-tunes."""
