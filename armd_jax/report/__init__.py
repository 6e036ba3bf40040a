"""A page about a run for people: the results of other commands as text, tables and pictures."""
