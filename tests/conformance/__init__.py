"""PEFT's own test suite, run against every method of peftx (README.md)."""
