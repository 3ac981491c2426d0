"""Generation of tokens toward a reward: IterRef, and the methods that it is compared with."""
