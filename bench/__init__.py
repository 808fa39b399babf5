"""What the optimizers cost. Each module here is a program; see --help."""
