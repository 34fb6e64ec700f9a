"""The surroundings of a run: the terminal, the machine, the disk, the compiler."""
