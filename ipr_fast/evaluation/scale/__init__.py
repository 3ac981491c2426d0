"""Experiments over many chains: described as data, run in shards, resumed, reported."""
