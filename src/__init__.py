"""Helpers behind the notebooks: `from src import data, prompts, scoring`. Importing it loads nothing and prints nothing."""
