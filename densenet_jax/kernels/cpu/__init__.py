"""Optional compiled kernels for XLA's CPU backend; `build` compiles them."""
