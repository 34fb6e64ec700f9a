"""DenseNets and Dual Path Networks as flax linen modules."""
