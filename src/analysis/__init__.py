"""What notebooks 04 and 05 look with: baselines, tables, figures, pages. benchmarks/signs.py measures a part of it."""
