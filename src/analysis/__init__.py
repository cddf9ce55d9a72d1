"""What notebooks 04 and 05 look with: baselines, tables, figures and pages. Only notebooks and tests import it."""
