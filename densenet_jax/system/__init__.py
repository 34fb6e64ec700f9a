"""What surrounds a run: the terminal, the machine, the disk, the compiler."""
