"""The step in C for CPUs, compiled when it is first used."""
