"""Each cost beside its floor. `scripts/bench` runs it; pytest does not."""
