"""The machine that a program runs on: its files, its memory, and the compilers that are installed."""
