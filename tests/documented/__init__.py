"""What recipes, README and docs tell a reader to type: found, given small stand-ins, and run."""
