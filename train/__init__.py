"""Recipes and the command line: data, loop, saving, reporting."""
