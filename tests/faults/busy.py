"""Keeps one core busy until it is killed."""

while True:
    pass
