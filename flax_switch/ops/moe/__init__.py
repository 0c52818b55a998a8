"""A sparse MLP: routing decides where tokens go, executors take them there and back, on one device or many."""
