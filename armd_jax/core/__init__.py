"""The mathematics: pure functions of arrays. Imports nothing of this package but `config`."""
