"""Helpers behind the notebooks: `from src import data, prompts, scoring`. Importing src loads and prints nothing."""
