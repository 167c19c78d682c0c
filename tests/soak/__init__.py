"""Hard use, for hours: ``make soak``. The tests use the same tools for seconds.

``python -m soak`` (from ``tests/``) writes each trial's outcome to ``.soak/rows.jsonl``, goes on where it stopped, and prints one
table.
"""
