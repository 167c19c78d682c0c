"""Hard use, for hours: ``make soak``. The tests use the same tools for seconds.

``python -m soak``, with ``tests/`` on the path, writes each trial's outcome to ``.soak/rows.jsonl``, goes on where it
stopped, and prints one table.
"""
